"""What conversion refuses: each with a message that names it, exit status 2, and the target exactly as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from leet_hf.cli import app
from leet_hf.retnet import directory as directories
from leet_hf.retnet.checkpoint import Checkpoint, ConversionError
from leet_hf.retnet.convert import convert
from retnet_checkpoints import write_port, write_torchscale

State = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"decoder_layers": 2}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def is_refused(words: str, source: Path, target: Path, *options: str, **arguments: Any) -> None:
    """By `convert` and by the command: the message has `words`, and nothing beside or in the target has changed."""
    before = contents(target.parent)
    with pytest.raises(ConversionError) as raised:
        convert(source, target, **arguments)
    assert words in str(raised.value), raised.value
    result = CliRunner().invoke(app, ["convert", str(source), str(target), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    flat = " ".join(result.output.split())
    assert " ".join(words.split()) in flat and "Traceback" not in flat, result.output
    assert contents(target.parent) == before
    assert not list(target.parent.glob(".*"))


def changed(**new: torch.Tensor | None) -> Callable[[State], None]:
    """A change of a state dict: keys (with _ for .) to set, or to take out."""

    def change(state: State) -> None:
        for name, value in new.items():
            key = next((key for key in state if key.replace(".", "_") == name), name)
            if value is None:
                del state[key]
            else:
                state[key] = value

    return change


STATES: dict[str, tuple[Callable[[State], None], str]] = {
    "a key is missing": (changed(layers_1_ffn_fc2_weight=None), "1 missing: layers.1.ffn.fc2.weight"),
    "the embeddings are missing": (
        changed(embed_tokens_weight=None, output_projection_weight=None),
        "neither embed_tokens.weight nor output_projection.weight",
    ),
    "a key too many": (changed(lora_a=torch.ones(2)), "1 surplus: lora_a"),
    "a layer too many": (
        lambda state: state.update({k.replace("layers.1", "layers.2"): v for k, v in list(state.items())}),
        "surplus: layers.2.ffn.fc1.weight, layers.2.ffn.fc2.weight",
    ),
    "another shape": (
        changed(layers_0_retention_v_proj_weight=torch.ones(32, 48)),
        "1 misshapen: layers.0.retention.v_proj.weight is (32, 48), must be (48, 32)",
    ),
    "all three": (
        changed(layer_norm_weight=None, extra=torch.ones(1), layers_0_ffn_gate_weight=torch.ones(3)),
        "1 missing: layer_norm.weight; 1 surplus: extra; 1 misshapen: layers.0.ffn.gate.weight",
    ),
    "integers": (changed(layers_0_ffn_fc1_weight=torch.ones(40, 32).int()), "layers.0.ffn.fc1.weight (torch.int32)"),
    "no tensor": (changed(step=3), "must hold tensors only, not step (int)"),  # type: ignore[arg-type]
    "another decay": (changed(retnet_rel_pos_decay=-torch.ones(4)), "is not the decay that the options say (retnet)"),
    "other angles": (changed(retnet_rel_pos_angle=torch.ones(8)), "rotates by other angles"),
    "no RetNet": (lambda state: [state.pop(k) for k in list(state) if "layers" in k], "is no RetNet of torchscale"),
    "FLA's": (
        lambda state: [
            state.update({f"model.{x}.weight": state.popitem()[1] for x in ("embeddings", "layers.1.attn.q_proj")}),
            [state.pop(key) for key in list(state) if "retention" in key],
        ],
        "nothing to convert, RetNetForCausalLM.from_pretrained reads",
    ),
    "nothing": (lambda state: state.clear(), "must hold a state dict"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), STATES.values(), ids=STATES.keys())
def test_keys_and_shapes(change: Callable[[State], None], words: str, tmp_path: Path) -> None:
    file, given, source = write_torchscale(tmp_path / "source", **SMALL)
    state = dict(source.state_dict())
    change(state)
    torch.save(state, file)
    (tmp_path / "here").mkdir()
    is_refused(words, file, tmp_path / "here" / "new", "--config", str(given), config=given)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown one": ({"decoder_layer": 2}, "did you mean decoder_layers?"),
    "another type": ({"decoder_layers": "2"}, "config has decoder_layers = '2', must be int"),
    "a truth for a number": ({"decoder_layers": True}, "config has decoder_layers = True, must be int"),
    "heads that do not divide": ({"decoder_retention_heads": 5}, "decoder_retention_heads is 5, must divide"),
    "odd heads": (
        {"decoder_retention_heads": 32, "decoder_value_embed_dim": 32},
        "a head of k has 1 dims, must be even",
    ),
    "no heads": ({"decoder_retention_heads": 0}, "decoder_retention_heads is 0"),
    "an unknown activation": ({"activation_fn": "tanh"}, "activation_fn is 'tanh', must be one of swish, gelu, relu"),
    "experts": ({"moe_freq": 2}, "moe_freq is 2: models with experts"),
    "two ways": ({"multiway": True}, "multiway is True"),
    "another vocabulary": ({"vocab_size": 65}, "vocab_size is 65 but the checkpoint has 64"),
    "tied, with two tables": ({"share_decoder_input_output_embed": True}, "differ, but the options say that they are"),
    "another width": ({"decoder_ffn_embed_dim": 48}, "layers.0.ffn.fc1.weight is (40, 32), must be (48, 32)"),
}


@pytest.mark.parametrize(("change", "words"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file, given, _ = write_torchscale(tmp_path / "source", **SMALL)
    given.write_text(json.dumps(json.loads(given.read_text()) | change))
    (tmp_path / "here").mkdir()
    is_refused(words, file, tmp_path / "here" / "new", "--config", str(given), config=given)


def damage(folder: Path, name: str) -> Path:
    """A source that can not be read, of the kind `name`; returns what to convert."""
    source = write_port(folder, shards=2, **SMALL)
    shard = folder / "model-1.safetensors"
    if name == "a cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif name == "a missing shard":
        shard.unlink()
    elif name == "an index that disagrees":
        index = folder / "model.safetensors.index.json"
        homes = json.loads(index.read_text())["weight_map"]
        homes["lm_head.weight"] = next(home for home in set(homes.values()) if home != homes["lm_head.weight"])
        index.write_text(json.dumps({"weight_map": homes}))
    elif name == "an index that leads outside":
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    elif name == "a config that is not JSON":
        (folder / "config.json").write_text("{")
    elif name == "no config":
        (folder / "config.json").unlink()
    elif name == "no weights":
        for file in folder.glob("model*"):
            file.unlink()
    elif name == "code in a pickle":
        torch.save(source, folder.parent / "whole_model.pt")
        return folder.parent / "whole_model.pt"
    elif name == "nothing there":
        return folder / "nowhere"
    elif name == "a file of another kind":
        return folder / "config.json"
    return folder


DAMAGED = {
    "a cut shard": "is damaged or not a safetensors file",
    "a missing shard": "lacks shards that model.safetensors.index.json names: model-1.safetensors",
    "an index that disagrees": "disagree about lm_head.weight",
    "an index that leads outside": "names files outside of its directory",
    "a config that is not JSON": "can not be read as JSON",
    "no config": "does not say which options its model has",
    "no weights": "files of weights found: none",
    "code in a pickle": "which is not loaded because it could run code",
    "nothing there": "does not exist",
    "a file of another kind": "must be a file of weights",
}


@pytest.mark.parametrize(("name", "words"), DAMAGED.items(), ids=DAMAGED.keys())
def test_damaged_sources(name: str, words: str, tmp_path: Path) -> None:
    source = damage(tmp_path / "port", name)
    (tmp_path / "here").mkdir()
    is_refused(words, source, tmp_path / "here" / "new")


def test_targets_that_are_in_use(tmp_path: Path) -> None:
    write_port(tmp_path / "port", **SMALL)
    here = tmp_path / "here"
    (here / "half").mkdir(parents=True)
    (here / "half" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (here / "file").write_text("mine")
    os.symlink(here / "half", here / "link")
    is_refused("is not empty (model-00001-of-00002.safetensors)", tmp_path / "port", here / "half")
    is_refused("is not a directory", tmp_path / "port", here / "file")
    is_refused("is not a directory", tmp_path / "port", here / "file", "--force", force=True)
    is_refused("is not a directory", tmp_path / "port", here / "link")
    is_refused("is not a directory, make it first", tmp_path / "port", tmp_path / "port" / "a" / "b")
    is_refused("max_shard_size is '5 apples'", tmp_path / "port", here / "new", "--max-shard-size", "5 apples",
               max_shard_size="5 apples")  # fmt: skip
    is_refused("origin is 'fla'", tmp_path / "port", here / "new", "--from", "fla", origin="fla")


def test_force_replaces_all_of_a_target_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_port(tmp_path / "port", **SMALL)
    new = tmp_path / "here" / "new"
    new.mkdir(parents=True)
    (new / "model-00001-of-00002.safetensors").write_bytes(b"half")
    before = contents(new)

    def full(state: State, file: Path, *rest: Any) -> None:
        if file.name.startswith("model-00003"):
            raise OSError(28, "No space left on device")
        save_file(state, file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(directories, "save_file", full)
        arguments = ["convert", str(tmp_path / "port"), str(new), "--force", "--max-shard-size", "12KB"]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert result.exit_code == 2 and "No space left on device" in result.output
        assert contents(new.parent) == {f"new/{name}": data for name, data in before.items()}
        patched.setattr(Checkpoint, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "port", new, force=True)
        assert contents(new.parent) == {f"new/{name}": data for name, data in before.items()}

    for exchange in (True, False):  # in one step, and where the system can not do that
        if not exchange:
            monkeypatch.setattr(directories, "_exchange", lambda one, other: False)
        convert(tmp_path / "port", new, force=True)
        assert sorted(contents(new.parent)) == ["new/config.json", "new/model.safetensors"]
    assert os.stat(new).st_mode & 0o777 == 0o777 & ~umask()


def interrupted(self: Checkpoint, keys: Any) -> State:
    raise KeyboardInterrupt


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_command_shows_what_it_did_and_what_a_kill_left(tmp_path: Path) -> None:
    write_port(tmp_path / "port", **SMALL)
    left = tmp_path / ".new.abc.partial"
    left.mkdir()
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "port"), str(tmp_path / "new")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for words in ("2 of 4 heads, gelu glu", "before each residual", "float32", "in 1 file", str(left)):
        assert words in result.output
    assert left.is_dir()
