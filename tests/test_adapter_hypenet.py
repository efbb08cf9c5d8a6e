"""HypeNet: logits, gradients and every decoding mode against the stand-in, report, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import host_checks
import tiny
from hosts.hypenet import HypeNetForCausalLM
from hosts.lightning import LIGHTNING, LightningConfig
from leet_hf import patch_model
from leet_hf.decay import alibi
from leet_hf.modes import Truth

LAYOUT = {"mixer_types": (LIGHTNING, "attn", LIGHTNING)}


def stock(**changes: Any) -> Any:
    return host_checks.make(HypeNetForCausalLM, LightningConfig(**LAYOUT | changes))


@functools.cache
def truth() -> Truth:
    return Truth(stock(), tiny.prompts())


@functools.cache
def patched() -> Any:
    return patch_model(stock())


# The published lightning attention has no attentions to return, so there is no truth for them.
@pytest.mark.parametrize("name", [name for name in host_checks.MODES if name != "recorded-outputs"])
def test_modes(name: str) -> None:
    host_checks.must_agree(name, patched(), truth())


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no rope in lightning": {"lightning_use_rope": False, "attn_use_rope": True, "attn_use_output_gate": False},
    "bare": {"qk_norm": False, "use_output_norm": False, "use_output_gate": False, "lightning_nkv": 1},
    "six heads, wide": {"num_attention_heads": 6, "head_dim": 12, "lightning_scale": "1/d", "lightning_nkv": 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes))


def test_gradient_checkpointing() -> None:
    host_checks.same_after_checkpointing(stock())


def test_patching_and_back() -> None:
    host_checks.patched_and_back(stock(), "hypenet", [0, 2], 3)


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock())


def test_kept_and_loaded(tmp_path: Path) -> None:
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(), {index: list(alibi(4)) for index in (0, 2)}, tokens=80)


class GatedDeltaNet(nn.Module):
    """Another kind of layer that HypeNet can have."""


def test_refusals() -> None:
    model = stock()
    model.model.layers[1].self_attn = GatedDeltaNet()
    host_checks.is_refused(model, "layers.1.self_attn is a GatedDeltaNet and .*keeps states")
    model = stock()
    model.config.sliding_window = 4096
    host_checks.is_refused(model, "sliding_window is 4096")
    model = stock()
    del model.model.rotary_emb
    host_checks.is_refused(model, "has no rotary_emb")
    model = stock()
    model.model.rotary_emb.register_buffer("inv_freq", torch.zeros(4), persistent=False)
    host_checks.is_refused(model, "rotary_emb.inv_freq holds no frequencies")
    model = stock()
    del model.model.layers[0].self_attn.k_norm
    host_checks.is_refused(model, "has no k_norm")


def test_a_layer_called_alone() -> None:
    model = stock()
    x, positions = torch.randn(1, 7, 32), torch.arange(7)[None]
    turns = model.model.rotary_emb(x, positions)
    want = model.model.layers[2](x, position_embeddings=turns)[0]
    got = patch_model(model).model.layers[2](x, position_embeddings=turns)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
