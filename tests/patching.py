"""What the tests of patching share: snapshots of models, outputs, comparisons, refusals."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    MiniMaxForCausalLM,
    MiniMaxForQuestionAnswering,
    MiniMaxForSequenceClassification,
    MiniMaxForTokenClassification,
    MiniMaxModel,
)

import tiny
from leet_hf import UnsupportedModelError, patch_model

KINDS = (
    MiniMaxForCausalLM,
    MiniMaxModel,
    MiniMaxForSequenceClassification,
    MiniMaxForTokenClassification,
    MiniMaxForQuestionAnswering,
)
IDS = torch.tensor(tiny.prompts((21,)))


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """All there is on every module of a model; its tensors and modules by identity."""
    return {
        name: {
            key: {k: id(v) for k, v in value.items()} if key in ("_parameters", "_buffers", "_modules") else value
            for key, value in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


def lightning(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "MiniMaxLightningAttention"]


@torch.no_grad()
def outputs(model: nn.Module, **options: Any) -> torch.Tensor:
    return model(IDS, **{"use_cache": False} | options)[0]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def skip_unless_stock_pickles() -> None:
    """Some versions of transformers (5.20) put a local function on their own models."""
    try:
        pickle.dumps(tiny.model())
    except AttributeError as error:
        pytest.skip(f"the stock model can not be pickled: {error}")


def refused(model: nn.Module, message: str, error: type = UnsupportedModelError, **options: Any) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch_model(model, **options)
    assert snapshot(model) == before
