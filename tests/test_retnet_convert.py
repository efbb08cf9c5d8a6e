"""Conversion of RetNet checkpoints: the same function, bit-equal weights, from every form a checkpoint comes in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import retnet_checkpoints as checkpoints
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM
from leet_hf.retnet.checkpoint import Checkpoint
from leet_hf.retnet.convert import convert, plan_conversion
from retnet_checkpoints import assert_equal_weights, assert_same_function, write_port, write_torchscale

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


FAMILIAR = {"activation_fn": "swish", "decoder_layers": 2}


@pytest.mark.parametrize("prefix", ["", "decoder.", "module.decoder."])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_and_prefixes_that_training_tools_add(suffix: str, prefix: str, tmp_path: Path) -> None:
    source, given = checkpoints.torchscale(**FAMILIAR)
    state = {prefix + key: value.clone() for key, value in source.state_dict().items()}
    file = tmp_path / f"weights.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    done = convert(file, tmp_path / "new", config=given)
    own = {name: key.removeprefix(prefix) for name, key in done.plan.names.items()}
    assert_equal_weights(RetNetForCausalLM.from_pretrained(tmp_path / "new"), source, own)


@pytest.mark.parametrize("place", ["args", "cfg"])
def test_a_fairseq_checkpoint_brings_its_options(place: str, tmp_path: Path) -> None:
    source, given = checkpoints.torchscale(**FAMILIAR)
    options = argparse.Namespace(**given, arch="retnet_base", lr=[1e-3], moe_freq=None)
    held = {"args": {"args": options}, "cfg": {"cfg": {"model": options}}}[place]
    state = {f"decoder.{key}": value for key, value in source.state_dict().items()}
    torch.save({"model": state, **held, "optimizer_history": []}, tmp_path / "checkpoint_best.pt")
    ours = RetNetForCausalLM.from_torchscale(tmp_path / "checkpoint_best.pt")
    batch = checkpoints.tokens()
    torch.testing.assert_close(ours(batch).logits, source(batch), rtol=0, atol=checkpoints.TOLERANCE)


def test_from_torchscale_reads_a_state_dict_and_shares_no_memory() -> None:
    source, given = checkpoints.torchscale(**FAMILIAR)
    state = source.state_dict()
    for config in (given, argparse.Namespace(**given), checkpoints.published.Options(**FAMILIAR)):
        if isinstance(config, checkpoints.published.Options):  # an object, as torchscale's own RetNetConfig is
            config = type("RetNetConfig", (), {})()
            config.__dict__.update(given)
        ours = RetNetForCausalLM.from_torchscale(state, config=config)
        assert type(ours) is RetNetForCausalLM and not ours.training
        assert torch.equal(ours.lm_head.weight, state["output_projection.weight"])
        with torch.no_grad():
            ours.lm_head.weight.zero_()
        assert state["output_projection.weight"].any()
    assert RetNetForCausalLM.from_torchscale(state, config=given, dtype=torch.bfloat16).dtype == torch.bfloat16
    ready = plan_conversion(state, config=given).config
    assert isinstance(ready, RetNetConfig)
    assert RetNetForCausalLM.from_torchscale(state, config=ready).config.to_dict() == ours.config.to_dict()


def test_from_torchscale_reads_the_directory_of_the_port(tmp_path: Path) -> None:
    source = write_port(tmp_path / "port", shards=2, use_glu=False)
    ours = RetNetForCausalLM.from_torchscale(tmp_path / "port")
    assert_same_function(ours, source, plan_conversion(tmp_path / "port").names)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_no_number_is_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    source, given = checkpoints.torchscale(**FAMILIAR)
    source = source.to(dtype)
    mixed = dict(source.state_dict())
    mixed["layer_norm.weight"] = mixed["layer_norm.weight"].float()
    wide = torch.promote_types(dtype, torch.float32)
    for state, expected in ((source.state_dict(), dtype), (mixed, wide)):
        torch.save(state, tmp_path / "weights.pt")
        done = convert(tmp_path / "weights.pt", tmp_path / "new", config=given, force=True)
        held = load_file(tmp_path / "new" / "model.safetensors")
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
        assert ours.dtype == expected and AutoConfig.from_pretrained(tmp_path / "new").dtype == expected
        for name, key in done.plan.names.items():
            assert torch.equal(held[name], state[key]) and held[name].dtype == state[key].dtype
            assert torch.equal(ours.state_dict()[name], state[key].to(expected)), name


def test_shards_pass_through_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_port(tmp_path / "port", shards=3)
    limit, at_once, read = 12_000, list[int](), Checkpoint.read

    def noted(self: Checkpoint, keys: Any) -> dict[str, torch.Tensor]:
        tensors = read(self, keys)
        at_once.append(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors

    monkeypatch.setattr(Checkpoint, "read", noted)
    done = convert(tmp_path / "port", tmp_path / "new", max_shard_size=limit)
    assert done.shards > 5 and max(at_once) <= limit and sum(at_once) >= done.plan.nbytes
    assert max(file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors")) <= limit + 2000  # names
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert_equal_weights(ours, source, done.plan.names)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.plan.nbytes and index["weight_map"].keys() == done.plan.names.keys()


def test_the_tokenizer_comes_along_and_nothing_else(tmp_path: Path) -> None:
    write_port(tmp_path / "port")
    for name in ("tokenizer.json", "generation_config.json", "modeling_retnet.py", "optimizer.pt"):
        (tmp_path / "port" / name).write_text("{}")
    done = convert(tmp_path / "port", tmp_path / "new")
    assert sorted(done.copied) == ["generation_config.json", "tokenizer.json"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
