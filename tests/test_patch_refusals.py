"""What patch_model refuses, and that nothing has changed then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxForCausalLM,
)

import leet_hf.patch
import tiny
from leet_hf import (
    UnsupportedModelError,
    patch_model,
    patch_report,
    unpatch_model,
)
from patching import refused


def test_a_model_without_a_recognised_layer() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    message = r"(?s)LlamaForCausalLM has no linear-attention layer.*Supported:.*minimax: MiniMaxLightningAttention"
    refused(llama, message)
    with pytest.raises(UnsupportedModelError, match=message):
        patch_report(llama)
    assert unpatch_model(llama) is llama
    refused(tiny.model("softmax-first", layer_types=[tiny.SOFTMAX] * 4), "has no linear-attention layer")
    refused(tiny.model().model.layers, r"has 0\.self_attn, a MiniMaxLightningAttention, without the MiniMaxModel: pass")
    with pytest.raises(TypeError, match=r"model is a str, must be a torch\.nn\.Module"):
        patch_model("MiniMax")  # type: ignore[type-var]


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = MiniMaxForCausalLM(tiny.config())
    refused(model, r"model\.layers\.0\.self_attn\.\S+ is on the meta device: load the weights first")
    model = tiny.model()
    model.model.layers[1].self_attn.out_proj.to("meta")
    refused(model, r"model\.layers\.1\.self_attn\.out_proj\.weight is on the meta device")


def _without_gate(model: Any) -> None:
    del model.model.layers[2].self_attn.output_gate


def _misnumbered(model: Any) -> None:
    model.model.layers[1].self_attn.layer_idx = 2


def _shortened(model: Any) -> None:
    model.model.layers = model.model.layers[:3]


def _retyped(model: Any) -> None:
    model.config.layer_types = tiny.LAYOUTS["softmax-first"]


def _replaced(model: Any) -> None:
    model.model.layers[0].self_attn.forward = tiny.model


@pytest.mark.parametrize(
    "change, message",
    [
        (_without_gate, r"model\.layers\.2\.self_attn is a MiniMaxLightningAttention, but it has no output_gate"),
        (_misnumbered, r"model\.layers\.1\.self_attn says it is layer 2 but is layer 1: number"),
        (_shortened, r"model is a MiniMaxModel, but it has 3 layers and its config\.num_hidden_layers is 4"),
        (_retyped, r"its layers\.0\.self_attn is a MiniMaxLightningAttention where config\.layer_types says 'full_att"),
        (_replaced, r"model\.layers\.0\.self_attn .* forward replaced already, by model: patch the model before that"),
    ],
)
def test_a_model_that_is_not_as_expected(change: Any, message: str) -> None:
    model = tiny.model()
    change(model)
    refused(model, message)


def test_an_unknown_method() -> None:
    refused(tiny.model(), "method is 'fast', must be one of 'auto', .*'torch'", ValueError, method="fast")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 2, 3, 4])
def test_an_exception_in_the_middle(calls: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers, the base model, then generate()."""
    count = 0

    def failing(inner: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise error("no more")
            return inner(*args)

        return run

    for name in ("install_forward", "install_generation"):
        monkeypatch.setattr(leet_hf.patch, name, failing(getattr(leet_hf.patch, name)))
    refused(tiny.model(), "no more", error)  # type: ignore[arg-type]
