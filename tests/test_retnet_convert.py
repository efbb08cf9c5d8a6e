"""Conversion of RetNet checkpoints: the same function, bit-equal weights, and a target that is whole or untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hosts import torchscale_retnet as published
from leet_hf.retnet import RetNetForCausalLM
from leet_hf.retnet.convert import convert

TOLERANCE = 1e-4
PORTS_OWN = ("use_lm_decay", "use_glu", "use_ffn_rms_norm")
TORCHSCALE: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "swish": {"activation_fn": "swish"},
    "relu, without sub-LN": {"activation_fn": "relu", "subln": False},
    "norms after": {"subln": False, "decoder_normalize_before": False},
    "deepnorm": {"subln": False, "deepnorm": True},
    "scaled and normalised embeddings": {"no_scale_embedding": False, "layernorm_embedding": True},
    "tied": {"share_decoder_input_output_embed": True, "no_scale_embedding": False},
    "narrow values": {"decoder_value_embed_dim": 16},
    "three heads, odd values": {
        "decoder_embed_dim": 30, "decoder_retention_heads": 3, "decoder_value_embed_dim": 51,
    },
    "one head, one layer": {"decoder_retention_heads": 1, "decoder_layers": 1},
    "large eps": {"layernorm_eps": 1e-2},  # where what a head is divided by before its norm does not cancel
}  # fmt: skip
PORT: dict[str, dict[str, Any]] = {
    "decay of language models": {"use_lm_decay": True},
    "FFN with Sub-LN": {"use_glu": False},
    "FFN with RMS Sub-LN": {"use_glu": False, "use_ffn_rms_norm": True, "activation_fn": "relu"},
    "FFN without Sub-LN": {"use_glu": False, "subln": False},
    "FFN, deepnorm": {"use_glu": False, "deepnorm": True, "subln": False, "use_lm_decay": True},
    "tied port": {"share_decoder_input_output_embed": True, "layernorm_embedding": True},
}


def tokens(batch: int = 2, length: int = 20, vocabulary: int = 64) -> Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))


def torchscale(seed: int = 0, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A decoder, and the options torchscale's RetNetConfig would get for it."""
    o = published.Options(**options)
    given = {name: value for name, value in vars(o).items() if name not in PORTS_OWN}
    return published.randomized(published.RetNetDecoder(o), seed), given


def port(seed: int = 0, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The port's model, and its `config.json`."""
    o = published.Options(**options)
    given = vars(o) | {"tie_word_embeddings": o.share_decoder_input_output_embed, "model_type": "retnet"}
    given |= {"architectures": ["RetNetForCausalLM"], "torch_dtype": "float32", "transformers_version": "4.35.0"}
    del given["share_decoder_input_output_embed"]
    return published.randomized(published.PortForCausalLM(o), seed), given


def write_torchscale(folder: Path, seed: int = 0, **options: Any) -> tuple[Path, Path, Any]:
    """A checkpoint as torchscale's users have it, a file of its options, and the model."""
    source, given = torchscale(seed, **options)
    folder.mkdir(exist_ok=True)
    torch.save(source.state_dict(), folder / "retnet.pt")
    (folder / "options.json").write_text(json.dumps(given))
    return folder / "retnet.pt", folder / "options.json", source


def write_port(folder: Path, shards: int = 1, seed: int = 0, **options: Any) -> Any:
    """A directory as the port's `save_pretrained` makes it, its weights in several shards if asked for."""
    source, given = port(seed, **options)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given))
    state = {key: value.clone() for key, value in source.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return source
    homes = {key: f"model-{i % shards}.safetensors" for i, key in enumerate(sorted(state))}
    for file in set(homes.values()):
        save_file({key: value for key, value in state.items() if homes[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return source


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_same_function(ours: Any, theirs: Any, names: dict[str, str]) -> None:
    """Logits, loss, gradients of every weight, and generated tokens."""
    batch = tokens()
    logits = theirs(batch)
    assert logits.std() > 0.1
    out = ours(input_ids=batch, labels=batch)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=TOLERANCE)
    loss = loss_of(logits, batch)
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=TOLERANCE)
    out.loss.backward()
    loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters(remove_duplicate=False)}
    for name, p in ours.named_parameters():
        assert gradients[names[name]].abs().max() > 0, name
        torch.testing.assert_close(
            p.grad, gradients[names[name]], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    prompt = batch[:, :9]
    generated = ours.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, published.greedy(theirs, prompt, 12))


def assert_equal_weights(ours: Any, theirs: Any, names: dict[str, str]) -> None:
    state, source = ours.state_dict(), theirs.state_dict()
    assert {name for name, _ in ours.named_parameters()} == names.keys()
    for name, key in names.items():
        assert torch.equal(state[name], source[key]), name


@pytest.mark.parametrize("options", TORCHSCALE.values(), ids=TORCHSCALE.keys())
def test_torchscale(options: dict[str, Any], tmp_path: Path) -> None:
    file, given, source = write_torchscale(tmp_path, **options)
    done = convert(file, tmp_path / "new", config=given)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert isinstance(ours, RetNetForCausalLM) and not ours.training
    assert_equal_weights(ours, source, done.plan.names)
    assert_same_function(ours, source, done.plan.names)


@pytest.mark.parametrize("options", PORT.values(), ids=PORT.keys())
def test_port(options: dict[str, Any], tmp_path: Path) -> None:
    source = write_port(tmp_path / "port", shards=3, **options)
    done = convert(tmp_path / "port", tmp_path / "new")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert_equal_weights(ours, source, done.plan.names)
    assert_same_function(ours, source, done.plan.names)
