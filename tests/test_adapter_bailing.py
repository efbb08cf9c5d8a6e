"""Ring / Ling linear 2.0 and 2.5: logits, gradients and every decoding mode against the stand-in, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import host_checks
import tiny
from hosts.bailing import BailingConfig, BailingMoeLinearV2ForCausalLM, BailingMoeV2_5ForCausalLM, BailingMoeV2_5Model
from leet_hf import patch_model
from leet_hf.decay import bailing
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error

LATENT = {"kv_lora_rank": 10}  # 2.5


def stock(kind: Any = None, **changes: Any) -> Any:
    """2.5 where the config has a latent, else 2.0. Layers 0 and 1 are linear, layer 2 has softmax attention."""
    latent = "kv_lora_rank" in changes
    kind = (BailingMoeV2_5ForCausalLM if latent else BailingMoeLinearV2ForCausalLM) if kind is None else kind
    return host_checks.make(kind, BailingConfig(**{"num_hidden_layers": 3} | changes))


def small(latent: bool) -> Any:
    """A linear layer and a softmax layer with experts."""
    return stock(num_hidden_layers=2, layer_group_size=2, **LATENT if latent else {})


@functools.cache
def truth_of(latent: bool) -> Truth:
    return Truth(small(latent), tiny.prompts())


@functools.cache
def patched_of(latent: bool) -> Any:
    return patch_model(small(latent))


# The published linear attention refuses output_attentions, so there is no truth for them.
@pytest.mark.parametrize("name", [name for name in host_checks.MODES if name != "recorded-outputs"])
def test_modes(name: str) -> None:
    """Of 2.5, whose layers have two ropes and a cache of whole heads."""
    host_checks.must_agree(name, patched_of(True), truth_of(True))


SHORT = ("greedy", "left-padding", "middle-padding", "packed-lengths", "beam", "static-cache", "early-exit", "lora")


@pytest.mark.parametrize("name", SHORT)
def test_modes_of_2_0(name: str) -> None:
    """Those in which its grouped softmax layers have a part."""
    host_checks.must_agree(name, patched_of(False), truth_of(False))


OPTIONS: dict[str, dict[str, Any]] = {
    "2.5": LATENT,
    "2.0": {"rms_norm_eps": 1e-3},
    "silu, no norm of q and k": {"linear_silu": True, "use_qk_norm": False, "use_bias": True},
    "eager": {"attn_implementation": "eager", **LATENT},
    "other rotations": {"partial_rotary_factor": 1.0, "num_attention_heads": 6, "num_key_value_heads": 3},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes))


def test_layers_that_predict_further_tokens_are_trained() -> None:
    """And do not run in evaluation."""
    model = stock(num_nextn_predict_layers=2, **LATENT)
    host_checks.same_logits_and_gradients(model.train())
    patch_model(model)
    ids = torch.tensor(tiny.prompts((9,)))
    assert len(model.model(input_ids=ids).mtp_hidden_states) == 2
    with pytest.raises(ValueError, match="trained on tokens, not embeddings"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert model.eval().model(input_ids=ids).mtp_hidden_states is None


def test_checkpointing_and_router_logits() -> None:
    host_checks.same_after_checkpointing(stock(**LATENT))
    ids = torch.tensor(tiny.prompts((9,)))
    options: dict[str, Any] = {"input_ids": ids, "output_router_logits": True, "output_hidden_states": True}
    want, got = (m(**options, use_cache=False) for m in (truth_of(True).model, patched_of(True)))
    assert len(got.router_logits) == len(want.router_logits) == 1 and len(got.hidden_states) == 3
    for (ours, chosen), (theirs, same) in zip(got.router_logits, want.router_logits, strict=True):
        assert relative_error(ours, theirs) <= 1e-5 and torch.equal(chosen, same)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    states = patched_of(True)(input_ids=ids, output_attentions=True).attentions
    assert list(states[0].shape) == [1, 4, 16, 16]


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock(**LATENT))


def test_patched_and_back() -> None:
    host_checks.patched_and_back(stock(**LATENT), "bailing", [0, 1], 3)


def test_kept_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading leaves the slopes to chance; here, to zeros."""
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    host_checks.kept_and_loaded(stock(**LATENT), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(**LATENT), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(**LATENT), {0: list(bailing(4, 0, 3)), 1: list(bailing(4, 1, 3))})


def decays(model: Any) -> Any:
    patch_model(model)
    return model.model.layers[1].attention._leet.decay


def test_decays_are_the_slopes_of_the_module() -> None:
    """Those that a cast has rounded are the formula's again; others are believed as they are."""
    assert decays(stock()).log_decays == pytest.approx(bailing(4, 1, 3), rel=1e-6)
    assert decays(stock().bfloat16()).log_decays == bailing(4, 1, 3)
    other = stock()
    other.model.layers[1].attention.slope.mul_(0.5)
    got = decays(other)
    assert got.log_decays == pytest.approx([g / 2 for g in bailing(4, 1, 3)]) and "not the published" in got.source
    unfilled = stock()
    unfilled.model.layers[1].attention.slope.fill_(float("nan"))
    got = decays(unfilled)
    assert got.log_decays == bailing(4, 1, 3) and "unfilled" in got.source


def test_the_base_model_alone() -> None:
    base = stock(BailingMoeV2_5Model, **LATENT)
    ids = torch.tensor(tiny.prompts((13,)))
    want = base(input_ids=ids)[0]
    assert relative_error(patch_model(base)(input_ids=ids, return_dict=False)[0], want) <= 1e-5


def _changed(path: str, **values: Any) -> Any:
    model = stock(**LATENT)
    for name, value in values.items():
        setattr(model.get_submodule(path), name, value)
    return model


def _without(path: str, name: str) -> Any:
    model = stock(**LATENT)
    delattr(model.get_submodule(path), name)
    return model


SECOND = "model.layers.1.attention"
KEPT: dict[str, Any] = {"_non_persistent_buffers_set": set()}  # as if the slopes came with the checkpoint
REFUSED: dict[str, tuple[Any, str]] = {
    "a projection": (lambda: _without(SECOND, "g_proj"), "a BailingMoeV2_5LinearAttention, but it has no g_proj"),
    "norms of q and k": (lambda: _without(SECOND, "key_layernorm"), "it has no key_layernorm"),
    "slopes": (lambda: _changed(SECOND, slope=-torch.ones(3)), "slope has 3 entries for 4 heads"),
    "no decays": (lambda: _changed(SECOND, slope=torch.zeros(4), **KEPT), "not negative and finite"),
    "heads": (lambda: _changed(SECOND, num_key_value_heads=3), "4 heads are no multiple of its 3 key-value heads"),
    "channels": (lambda: _changed(SECOND, num_key_value_heads=2), "query_key_value gives 192 channels where"),
    "silu in 2.5": (lambda: stock(linear_silu=True, **LATENT), "linear_silu is set, which the published"),
    "its place": (lambda: _changed(SECOND, layer_idx=2), "says it is layer 2 but is layer 1"),
    "a rope": (lambda: _without("model", "rotary_emb_mla"), "it has no rotary_emb_mla"),
    "a rope without frequencies": (
        lambda: _changed("model.rotary_emb_mla", inv_freq=torch.tensor([1.0, float("nan")])),
        "its rotary_emb_mla.inv_freq holds no frequencies",
    ),
    "softmax": (lambda: _changed("model.layers.2", attention=torch.nn.Linear(4, 4)), "is a Linear and it has no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_expected_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    host_checks.is_refused(make(), message)
