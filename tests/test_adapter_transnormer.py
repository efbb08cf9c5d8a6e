"""TransNormerLLM: logits, gradients and every decoding mode against the stand-in, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import host_checks
import tiny
from hosts.transnormer import TransnormerConfig, TransnormerForCausalLM, TransnormerModel
from leet_hf import patch_model
from leet_hf.decay import minimax_text_01
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error


def stock(kind: Any = TransnormerForCausalLM, **changes: Any) -> Any:
    return host_checks.make(kind, TransnormerConfig(**changes))


@functools.cache
def truth(scaled: bool = True) -> Truth:
    return Truth(stock(no_scale_embedding=not scaled, decoder_layers=2), tiny.prompts())


@functools.cache
def patched(scaled: bool = True) -> Any:
    return patch_model(stock(no_scale_embedding=not scaled, decoder_layers=2))


# The published attention of an eval forward gives no weights, so there is no truth for them.
@pytest.mark.parametrize("name", [name for name in host_checks.MODES if name != "recorded-outputs"])
def test_modes(name: str) -> None:
    scaled = name != "inputs-embeds"  # the host does not scale what it is given
    host_checks.must_agree(name, patched(scaled), truth(scaled))


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no lrpe, six heads": {
        "linear_use_lrpe_list": (False,) * 3, "decoder_attention_heads": 6, "hidden_dim": 48, "decoder_embed_dim": 24,
    },
    "biases, layernorm": {"bias": True, "norm_type": "layernorm", "linear_act_fun": "1+elu"},
}  # fmt: skip


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes))


def test_checkpointing_hidden_states_and_tuples() -> None:
    host_checks.same_after_checkpointing(stock())
    host_checks.same_hidden_states(stock())


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock())


def test_patched_and_back() -> None:
    host_checks.patched_and_back(stock(), "transnormer", range(3), 3)


@torch.no_grad()
def test_the_base_model_and_a_layer_alone() -> None:
    base, own = stock(TransnormerModel), stock(TransnormerModel)
    ids, mask = torch.tensor(tiny.prompts((13, 13))), torch.ones(2, 13, dtype=torch.int64)
    want = base(input_ids=ids)[0]
    patch_model(own)
    assert relative_error(own(input_ids=ids, attn_padding_mask=mask)[0], want) <= 1e-5
    mask[1, :4] = 0
    got = own(input_ids=ids, attn_padding_mask=mask)[0][1, 4:]
    assert relative_error(got, base(input_ids=ids[1:, 4:])[0][0]) <= 1e-5
    x = torch.randn(2, 13, 32)
    want, got = (m.layers[0](x, slope_rate=base.slopes * (1 + 1e-5))[0] for m in (base, own))
    assert relative_error(got, want) <= 1e-5


def test_kept_and_loaded(tmp_path: Path) -> None:
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(), {0: list(minimax_text_01(4, 0, 3)), 2: list(minimax_text_01(4, 2, 3))})


def decays(model: Any) -> list[Any]:
    patch_model(model)
    return [layer.token_mixer._leet.decay for layer in model.model.layers]


def test_decays_are_the_formula_or_the_slopes_of_the_model() -> None:
    """As they were made, cast, or left on the meta device by from_pretrained; other slopes are believed."""
    want = [minimax_text_01(4, index, 3) for index in range(3)]
    cast, meta, other = stock(), stock(), stock()
    cast.model.slopes = cast.model.slopes.half()
    meta.model.slopes = meta.model.slopes.to("meta")
    other.model.slopes = other.model.slopes * 0.5
    for model in (stock(), cast, meta):
        assert [decay.log_decays for decay in decays(model)] == want
    for got, formula in zip(decays(other), want, strict=True):
        assert got.log_decays == pytest.approx([g / 2 for g in formula]) and "not the formula's" in got.source


def _changed(path: str, **values: Any) -> Any:
    model = stock()
    for name, value in values.items():
        setattr(model.get_submodule(path), name, value)
    return model


def _without(path: str, name: str) -> Any:
    model = stock()
    delattr(model.get_submodule(path), name)
    return model


FIRST = "model.layers.0.token_mixer"
REFUSED: dict[str, tuple[Any, str]] = {
    "the projection": (lambda: _without(FIRST, "qkvu_proj"), "layers.0.token_mixer is a NormLinearAttention, but it"),
    "the norm": (lambda: _without(FIRST, "norm"), "it has no norm"),
    "lrpe": (lambda: _without(FIRST, "lrpe"), "it has no lrpe with a theta"),
    "theta": (lambda: _changed(f"{FIRST}.lrpe", theta=torch.nn.Parameter(torch.ones(4, 1, 4))), "turns 16 channels"),
    "heads": (lambda: _changed(FIRST, num_heads=5), "no multiple of 4 times its 5 heads"),
    "slopes": (lambda: _without("model", "slopes"), "it has no slopes"),
    "too few slopes": (lambda: _changed("model", slopes=torch.ones(3, 1, 1)), "3 slopes for 4 heads"),
    "no decays": (lambda: _changed("model", slopes=torch.zeros(4, 1, 1)), "not positive and finite"),
    "layers": (lambda: _changed("model", num_layers=4), "it has 3 layers and its num_layers, which slopes depend on"),
    "one layer": (lambda: stock(decoder_layers=1), "layers is 1, must be at least 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_expected_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    host_checks.is_refused(make(), message)
