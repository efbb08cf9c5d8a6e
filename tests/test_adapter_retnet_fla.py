"""FLA's RetNet: logits, gradients and every decoding mode against the stand-in, refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import host_checks
import tiny
import tiny_retnet
from hosts.fla_retnet import RetNetConfig, RetNetForCausalLM, RetNetModel
from leet_hf import patch_model, patch_report
from leet_hf.decay import retnet
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error
from untuned import take_the_first_that_runs

SETTINGS: dict[str, Any] = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_heads": 4,
    "expand_v": 1.5, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def stock(kind: Any = RetNetForCausalLM, config: Any = RetNetConfig, **changes: Any) -> Any:
    return host_checks.make(kind, config(**SETTINGS | changes))


@functools.cache
def truth() -> Truth:
    return Truth(stock(num_hidden_layers=2), tiny.prompts())


@functools.cache
def patched() -> Any:
    return patch_model(stock(num_hidden_layers=2))


# FLA returns no attentions, so there is no truth for them.
@pytest.mark.parametrize("name", [name for name in host_checks.MODES if name != "recorded-outputs"])
def test_modes(name: str) -> None:
    host_checks.must_agree(name, patched(), truth())


HYBRID: dict[str, Any] = {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 5e5}}
SHORT = (
    "greedy", "beam", "left-padding", "middle-padding", "chunked-prefill", "packed-lengths", "packed-positions",
    "chat", "static-cache", "static-cache-given", "static-middle-padding", "prompt-lookup", "early-exit", "lora",
    "device-map", "reset", "reorder",
)  # fmt: skip


@functools.cache
def hybrid() -> tuple[Any, Truth]:
    model = stock(num_hidden_layers=2, **HYBRID)
    return patch_model(copy.deepcopy(model)), Truth(model, tiny.prompts())


@pytest.mark.parametrize("name", SHORT)
def test_modes_with_a_softmax_layer(name: str) -> None:
    """Those in which it has a part."""
    host_checks.must_agree(name, *hybrid())


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "softmax layers": {"attn": HYBRID["attn"] | {"layers": [0, 2], "qkv_bias": True, "qk_norm": True}},
    "grouped heads": {"num_kv_heads": 2, "expand_k": 0.5},
    "feature map": {"feature_map": "relu"},
    "norm and gate apart": {"fuse_norm": False},
    "another gate": {"hidden_act": "gelu"},
    "no gate": {"use_output_gate": False, "elementwise_affine": False},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes))


def test_checkpointing_hidden_states_and_tuples() -> None:
    host_checks.same_after_checkpointing(stock())
    host_checks.same_hidden_states(stock())


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock(**HYBRID))


def test_patched_and_back() -> None:
    host_checks.patched_and_back(stock(), "retnet-fla", range(3), 3)
    host_checks.patched_and_back(stock(**HYBRID), "retnet-fla", [0, 2], 3)


def test_the_base_model_alone() -> None:
    base = stock(RetNetModel)
    ids = torch.tensor(tiny.prompts((13,)))
    want = base(input_ids=ids, use_cache=False)[0]
    assert relative_error(patch_model(base)(input_ids=ids)[0], want) <= 1e-5


@torch.no_grad()
def test_packed_by_the_hosts_name() -> None:
    bounds = torch.tensor([0, *(len(row) for row in tiny.prompts())]).cumsum(0)
    ids = torch.tensor([[token for row in tiny.prompts() for token in row]])
    want = truth().model(input_ids=ids, cu_seqlens=bounds, use_cache=False).logits
    assert relative_error(patched()(input_ids=ids, cu_seqlens=bounds).logits, want) <= 1e-5
    with pytest.raises(ValueError, match="two names of one argument"):
        patched()(input_ids=ids, cu_seqlens=bounds, cu_seq_lens_q=bounds)


@torch.no_grad()
def test_a_block_called_alone() -> None:
    """It is given a mask, where the base forward gives a context."""
    x, mask = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    want = truth().model.model.layers[1](x, attention_mask=mask)[0]
    got = patched().model.layers[1](x, attention_mask=mask)[0]
    assert relative_error(got[mask.bool()], want[mask.bool()]) <= 1e-5


def test_kept_and_loaded(tmp_path: Path) -> None:
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(**HYBRID), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(), {0: list(retnet(4)), 2: list(retnet(4))})


def test_our_own_retnet_is_left_to_itself() -> None:
    """It has the class names of FLA's; it needs no patching, and its report says so."""
    model = patch_model(tiny_retnet.model())
    assert {layer.adapter for layer in patch_report(model).layers} == {"retnet"}


def _without(path: str) -> Any:
    model = stock(use_output_gate=False)
    owner, _, name = f"model.layers.1.attn.{path}".rpartition(".")
    delattr(model.get_submodule(owner), name)
    return model


def _changed(path: str, **values: Any) -> Any:
    model = stock()
    for name, value in values.items():
        setattr(model.get_submodule(path), name, value)
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "a projection": (lambda: _without("k_proj"), "layers.1.attn is a MultiScaleRetention, but it has no k_proj"),
    "a norm": (lambda: _without("g_norm"), "it has no g_norm"),
    "rope": (lambda: _without("rotary"), "it has no rotary"),
    "short convolutions": (lambda: _changed("model.layers.1.attn", use_short_conv=True), "short convolutions"),
    "xPos": (lambda: _changed("model.layers.1.attn.rotary", scale_base=512), r"scales them \(xPos\)"),
    "16-bit positions": (lambda: _changed("model.layers.1.attn.rotary", pos_idx_in_fp32=False), "in 16 bits"),
    "another base": (lambda: _changed("model.layers.1.attn.rotary", base=5e5), "layers.1.attn has another rotary.base"),
    "its place": (lambda: _changed("model.layers.1.attn", layer_idx=2), "says it is layer 2 but is layer 1"),
    "residuals": (lambda: _changed("model", use_attnres=True), "attnres_block_size is set"),
    "a layer": (lambda: _short(), "it has 2 layers"),
    "softmax": (
        lambda: _changed("model.layers.1", attn=nn.Linear(32, 32)),
        "layers.1.attn is a Linear and it has no q_proj",
    ),
    "windows": (lambda: stock(attn=HYBRID["attn"] | {"window_size": 4}), "its window_size is 4"),
    "a head's forward": (lambda: _wrapped(), "has had its forward replaced already"),
}


def _short() -> Any:
    model = stock()
    model.model.layers = model.model.layers[:2]
    return model


def _wrapped() -> Any:
    model = stock()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_expected_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    host_checks.is_refused(make(), message)


@pytest.mark.gpu
def test_the_classes_of_the_package(auto_classes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, gradients and greedy decoding of flash-linear-attention's own model, where it is installed."""
    theirs = pytest.importorskip("fla.models")
    take_the_first_that_runs(monkeypatch.setattr)
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")  # else FLA's chunks are products of TF32
    model = stock(theirs.RetNetForCausalLM, theirs.RetNetConfig, fuse_cross_entropy=False).cuda()
    ids = torch.tensor(tiny.prompts((70, 70)), device="cuda")  # more than a chunk of FLA's
    ours = patch_model(copy.deepcopy(model))
    want, got = (m(input_ids=ids, labels=ids, use_cache=False) for m in (model, ours))
    assert relative_error(got.logits, want.logits) <= 1e-4
    want.loss.backward()
    got.loss.backward()
    grads = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, grads[name].grad) <= 1e-3, name
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    written = ours.generate(ids[:1], **options)
    again = model(input_ids=written.sequences[:, :-1], use_cache=False).logits[:, -20:]
    assert relative_error(torch.stack(written.logits, 1), again) <= 1e-4
