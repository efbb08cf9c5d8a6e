"""MiniMax-Text-01 and M1 of their own repositories: logits, gradients, every decoding mode, slopes, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import host_checks
import tiny
from hosts import minimax_text_01 as host
from hosts.minimax_text_01 import MiniMaxText01Config, MiniMaxText01ForCausalLM
from leet_hf import decay as formulas
from leet_hf import patch_model, patch_report
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error


def stock(**changes: Any) -> Any:
    return host_checks.make(MiniMaxText01ForCausalLM, MiniMaxText01Config(**changes))


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
    "router losses": {"output_router_logits": True},
    "six heads, one expert": {"num_attention_heads": 6, "num_experts_per_tok": 1, "rotary_dim": 8},
    "residuals, softmax first": {"postnorm": False, "shared_intermediate_size": 0, "attn_type_list": (1, 0, 1)},
    "eager": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    options = {key: value for key, value in changes.items() if key == "output_router_logits"}
    host_checks.same_logits_and_gradients(stock(**changes), **options)


def test_gradient_checkpointing() -> None:
    """Theirs loses the slopes; the truth is without it."""
    host_checks.same_after_checkpointing(stock())


def test_patching_and_back() -> None:
    host_checks.patched_and_back(stock(), "minimax_text_01", [0, 1], 3)


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock())


def test_kept_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading leaves the tables of ropes to chance; here, to zeros."""
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(), tmp_path)


def test_states_stay_float32() -> None:
    decays = {index: list(formulas.minimax_text_01(4, index, 3)) for index in (0, 1)}
    host_checks.states_stay_float32(stock(), decays, tokens=80)


def test_a_trainer_is_not_told_that_the_loss_takes_more_arguments(tmp_path: Any) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tiny.prompts((8, 8))]
    model = patch_model(stock())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert not trainer.model_accepts_loss_kwargs
    assert trainer.train().training_loss > 0


class TestSlopes:
    def test_of_the_base_model_where_they_are_not_the_formulas(self) -> None:
        model = stock()
        model.model.slopes = model.model.slopes.flip(0) * 1.5
        ids = torch.tensor(tiny.prompts((21,)))
        want = model(input_ids=ids).logits
        patch_model(model)
        assert relative_error(model(input_ids=ids).logits, want) <= 1e-5
        assert "not the formula's" in patch_report(model).layers[0].decay
        assert relative_error(want, stock()(input_ids=ids).logits) > 1e-3

    def test_left_on_the_meta_device_are_the_formulas(self) -> None:
        """A plain attribute, which loading on the meta device leaves there."""
        model = stock()
        ids = torch.tensor(tiny.prompts((21,)))
        want = model(input_ids=ids).logits
        model.model.slopes = model.model.slopes.to("meta")
        assert relative_error(patch_model(model)(input_ids=ids).logits, want) <= 1e-5

    def test_that_can_not_be(self) -> None:
        model = stock()
        model.model.slopes = model.model.slopes[:3]
        host_checks.is_refused(model, "3 slopes for 4 heads")
        model.model.slopes = torch.tensor([0.5, 0.2, float("nan"), 0.1])
        host_checks.is_refused(model, "not positive and finite")
        del model.model.slopes
        host_checks.is_refused(model, "has no slopes")

    def test_of_one_layer_alone(self) -> None:
        model = stock()
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        host_checks.is_refused(model, "at least 2")


def test_m1_has_names_of_its_own() -> None:
    classes = (host.MiniMaxText01Model, host.MiniMaxText01LightningAttention, host.MiniMaxText01Attention)
    names = [kind.__name__ for kind in classes]
    try:
        for kind, name in zip(classes, names, strict=True):
            kind.__name__ = name.replace("Text01", "M1")
        host_checks.same_logits_and_gradients(stock())
        assert "MiniMaxM1Model" in str(patch_report(stock()))
    finally:
        for kind, name in zip(classes, names, strict=True):
            kind.__name__ = name


def test_refusals() -> None:
    model = stock()
    del model.model.layers[0].self_attn.output_gate
    host_checks.is_refused(model, "model.layers.0.self_attn .*has no output_gate")
    model = stock()
    model.model.layers[1].self_attn.qkv_proj = nn.Linear(32, 90)
    host_checks.is_refused(model, "qkv_proj gives 90 channels where its heads need 96")
    model = stock()
    model.config.attn_type_list = [0, 1, 1]
    host_checks.is_refused(model, "layers.1.self_attn .*attn_type_list says 1")
    model = stock()
    del model.model.layers[2].self_attn.rotary_emb
    host_checks.is_refused(model, "layers.2.self_attn .*rotary_emb has no")
    model = stock()
    model.config.sliding_window = 8
    host_checks.is_refused(model, "sliding_window is 8")


def test_a_lightning_layer_without_its_base_model() -> None:
    layer = stock().model.layers[0]
    host_checks.is_refused(layer, "without the MiniMaxText01Model")
