"""Conversion of RetNet checkpoints of torchscale and its Hugging Face port to RetNetForCausalLM.

Weights are renamed and nothing else: every number stays as it is, bit for bit, and so does its dtype. Every key and
shape is checked before anything is written, tensors pass through memory a shard at a time, and the target appears whole
or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import decay as formulas
from .checkpoint import Checkpoint, ConversionError, listed, open_checkpoint, read_json
from .configuration_retnet import RetNetConfig
from .directory import check_target, size_in_bytes, unfinished, whole_directory, write_weights
from .torchscale import (
    DECAY,
    LAYOUTS,
    POSITION,
    Layout,
    config_of,
    port_options,
    source_names,
    torchscale_options,
)  # fmt: skip

AUTO = "auto"
# What makes a directory usable by itself and does not depend on the names of weights.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A checked conversion: which key of the checkpoint each weight of RetNetForCausalLM is."""

    checkpoint: Checkpoint
    layout: Layout
    config: RetNetConfig
    names: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.checkpoint.tensors[key].nbytes for key in self.names.values())


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: the plan it followed, the directory it wrote with how many shards, and files it copied.

    `unfinished` are hidden directories beside the target which conversions that were killed left there, or which belong
    to one that is still running.
    """

    plan: Plan
    target: Path
    shards: int
    copied: tuple[str, ...]
    unfinished: tuple[Path, ...]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    origin: str = AUTO,
    config: Any = None,
    force: bool = False,
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """Write the checkpoint at `source` to the directory `target`, for `AutoModelForCausalLM.from_pretrained`.

    Args:
        source: a file of `torch.save` or safetensors, or a directory with weights, in shards or not.
        target: a directory that does not exist or is empty; with `force`, one to replace as a whole.
        origin: "torchscale", "hf-port" (repository syncdoth/RetNet), or "auto" to tell by the keys.
        config: the source's options: a dict, a JSON file, torchscale's RetNetConfig, fairseq's Namespace, or our
            RetNetConfig. None: the directory's `config.json`, or what fairseq saved with the weights.
        max_shard_size: of the files written, in bytes or as "5GB"; about this much memory is used.

    Raises ConversionError, with `target` as it was, if the checkpoint can not be read, has missing, surplus or
    misshapen keys, has options that are unknown or do not fit together, or if `target` can not be written.
    """
    target = Path(target)
    check_target(target, force)
    shard_size = size_in_bytes(max_shard_size)
    plan = plan_conversion(source, origin=origin, config=config)
    tensors = plan.checkpoint.tensors
    left = tuple(unfinished(target))
    with whole_directory(target, force) as folder:
        shards = write_weights(folder, plan.names, tensors, plan.checkpoint.read, shard_size)
        plan.config.save_pretrained(folder)
        copied = tuple(name for name in COMPANIONS if (Path(source) / name).is_file())
        for name in copied:
            shutil.copyfile(Path(source) / name, folder / name)
    return Conversion(plan, target, shards, copied, left)


def load(
    cls: Any, source: str | Path | Mapping[str, Any], *, config: Any = None, origin: str = AUTO, **kwargs: Any
) -> Any:
    """An instance of `cls`, RetNetForCausalLM, with the weights of `source`: see `convert`, and nothing is written.

    `source` may also be a state dict, which the model shares no memory with. Further arguments are those of
    `from_pretrained`, such as `dtype` and `device_map`.
    """
    plan = plan_conversion(source, origin=origin, config=config)
    tensors = plan.checkpoint.read(plan.names.values())
    state = {name: tensors[key].detach().clone() for name, key in plan.names.items()}
    return cls.from_pretrained(None, config=plan.config, state_dict=state, **kwargs)


def plan_conversion(source: str | Path | Mapping[str, Any], *, origin: str = AUTO, config: Any = None) -> Plan:
    """Check all of a checkpoint against its options, reading only what is small. Raises ConversionError."""
    if origin not in (AUTO, *LAYOUTS):
        raise ConversionError(f"origin is {origin!r}, must be one of {', '.join((AUTO, *LAYOUTS))}")
    checkpoint = open_checkpoint(source)
    layout = _layout(checkpoint, origin)
    ours = _config(source, checkpoint, layout, config)
    names = source_names(ours, layout)
    _use_either_of_tied(checkpoint, layout, ours, names)
    _check_keys(checkpoint, layout, ours, names)
    _check_buffers(checkpoint, layout, ours)
    dtypes = {checkpoint.tensors[key].dtype for key in names.values()}
    widest = dtypes.pop()
    for dtype in dtypes:  # so that loading rounds nothing
        widest = torch.promote_types(widest, dtype)
    ours.dtype = widest
    return Plan(checkpoint, layout, ours, names)


def _layout(checkpoint: Checkpoint, origin: str) -> Layout:
    keys = list(checkpoint.tensors)
    if origin == AUTO:
        if any(key.startswith("model.layers.") and ".retention." in key for key in keys):
            origin = "hf-port"
        elif any("layers." in key and ".retention." in key for key in keys):
            origin = "torchscale"
        elif "model.embeddings.weight" in keys and any(".attn.q_proj." in key for key in keys):
            raise ConversionError(
                f"{checkpoint.name} has the names of flash-linear-attention's RetNet, which are also leet_hf's: there "
                "is nothing to convert, RetNetForCausalLM.from_pretrained reads its directory as it is"
            )
        else:
            raise ConversionError(
                f"{checkpoint.name} is no RetNet of torchscale or its Hugging Face port: no key has a layer's "
                f"`.retention.`; its first keys are {listed(keys, 4)}"
            )
    layout, prefix = LAYOUTS[origin], ""
    while wrapper := next((w for w in layout.wrappers if all(key.startswith(prefix + w) for key in keys)), None):
        prefix += wrapper
    return replace(layout, decoder=prefix + layout.decoder, head=prefix + layout.head)


def _config(source: Any, checkpoint: Checkpoint, layout: Layout, given: Any) -> RetNetConfig:
    port = layout.title == LAYOUTS["hf-port"].title
    if isinstance(given, RetNetConfig):
        return RetNetConfig(**given.to_diff_dict())
    if isinstance(given, str | Path):
        given = read_json(Path(given))
    if given is None and not isinstance(source, Mapping) and (Path(source) / "config.json").is_file():
        given = read_json(Path(source) / "config.json")
    if given is None and checkpoint.options is not None and not port:
        from argparse import Namespace

        given = Namespace(**checkpoint.options)
    if given is None:
        raise ConversionError(
            f"{checkpoint.name} does not say which options its model has: give config (--config), the options of "
            f"{layout.title} as a dict or a JSON file"
        )
    options = port_options(given if isinstance(given, Mapping) else vars(given)) if port else torchscale_options(given)
    embeddings = [key for key in (f"{layout.decoder}embed_tokens.weight", layout.head) if key in checkpoint.tensors]
    if not embeddings:
        raise ConversionError(f"{checkpoint.name} has neither {layout.decoder}embed_tokens.weight nor {layout.head}")
    return config_of(options, checkpoint.tensors[embeddings[0]].shape[0])


def _use_either_of_tied(checkpoint: Checkpoint, layout: Layout, config: RetNetConfig, names: dict[str, str]) -> None:
    """Tied embeddings may be there twice, which must be the same, or once, under either name."""
    table, head = names["model.embeddings.weight"], layout.head
    if not config.tie_word_embeddings or head not in checkpoint.tensors:
        return
    if table not in checkpoint.tensors:
        names["model.embeddings.weight"] = head
        return
    both = checkpoint.read([table, head])
    if not torch.equal(both[table], both[head]):
        raise ConversionError(
            f"{table} and {head} differ, but the options say that they are one: correct "
            "share_decoder_input_output_embed (torchscale) or tie_word_embeddings (the port)"
        )


def _check_keys(checkpoint: Checkpoint, layout: Layout, config: RetNetConfig, names: dict[str, str]) -> None:
    from .modeling_retnet import RetNetForCausalLM

    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in RetNetForCausalLM(config).named_parameters()}
    if expected.keys() != names.keys():
        odd = sorted(expected.keys() ^ names.keys())
        raise ConversionError(f"this RetNetConfig has weights that {layout.title} has no names for: {listed(odd)}")
    here = checkpoint.tensors
    spare = {layout.decoder + POSITION, layout.decoder + DECAY}
    spare |= {layout.head} if config.tie_word_embeddings else set()
    wrong = {
        "missing": sorted(key for key in names.values() if key not in here),
        "surplus": sorted(here.keys() - set(names.values()) - spare),
        "misshapen": [
            f"{key} is {here[key].shape}, must be {expected[name]}"
            for name, key in names.items() if key in here and here[key].shape != expected[name]
        ],
    }  # fmt: skip
    if any(wrong.values()):
        lines = [f"{len(keys)} {what}: {listed(keys)}" for what, keys in wrong.items() if keys]
        raise ConversionError(
            f"the keys of {checkpoint.name} are not those of {layout.title} with these options: " + "; ".join(lines)
        )


def _check_buffers(checkpoint: Checkpoint, layout: Layout, config: RetNetConfig) -> None:
    """Positions and decay follow from the options; a checkpoint that holds them must hold the same."""
    heads, pairs = config.num_heads, config.key_dim // 2
    angles = (config.rope_theta ** -torch.linspace(0, 1, pairs, dtype=torch.float64)).repeat_interleave(2)
    decays = torch.tensor(getattr(formulas, config.decay)(heads), dtype=torch.float64)
    expected = {
        layout.decoder + POSITION: (angles, "rotates by other angles than theta^-linspace(0, 1, K/2)"),
        layout.decoder + DECAY: (
            decays, f"is not the decay that the options say ({config.decay}): correct use_lm_decay, or the heads",
        ),
    }  # fmt: skip
    held = checkpoint.read(key for key in expected if key in checkpoint.tensors)
    for key, buffer in held.items():
        right, words = expected[key]
        # In float32, 1 - 2^(-5-h) is rounded before its logarithm is taken, by up to 2^-25; models may be 16-bit.
        near = 1e-5 if buffer.dtype in (torch.float32, torch.float64) else 2.0**-7
        if not (buffer.shape == right.shape and torch.allclose(buffer.double(), right, rtol=near, atol=2e-7)):
            raise ConversionError(f"{key} {words}: it is {_shown(buffer)}, must be {_shown(right)}")


def _shown(values: Tensor) -> str:
    first = ", ".join(f"{value:.6g}" for value in values.flatten()[:8].tolist())
    return f"[{first}{', ...' if values.numel() > 8 else ''}]"
