"""Adapters from outside, and the public names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    MiniMaxModel,
)

import leet_hf.patch
import tiny
from leet_hf import (
    patch_model,
    patch_report,
    register_adapter,
    unpatch_model,
)
from leet_hf.adapters import Adapter, Decay, Projected, RecurrentShape, adapters
from leet_hf.host import decoder_forward
from leet_hf.versions import CACHE, cache_of
from patching import IDS, outputs, same


class GatedAttention(nn.Module):
    """A made-up recurrent module with decays per token."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.decay, self.out = nn.Linear(64, 96), nn.Linear(64, 2), nn.Linear(32, 64)
        self.layer_idx = 0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        raise NotImplementedError("only patched")


class GatedModel(MiniMaxModel):
    """A base model of another name."""


class GatedAdapter(Adapter):
    name, layer_class, base_class, decay_formula = "gated", "GatedAttention", "GatedModel", "per token"
    base_forward = staticmethod(decoder_forward)

    def misfit(self, layer: nn.Module) -> str | None:
        return None

    def base_misfit(self, base: nn.Module) -> str | None:
        return None

    def index(self, layer: Any) -> int:
        return layer.layer_idx

    def shape(self, attention: nn.Module) -> RecurrentShape:
        return RecurrentShape(2, 2, 2, 16, 16)

    def decay(self, layer: nn.Module) -> Decay | None:
        return None

    def scale(self, layer: nn.Module) -> float:
        return 0.25

    def project(self, layer: Any, hidden_states: torch.Tensor, position_embeddings: Any) -> Projected:
        q, k, v = layer.project(hidden_states).unflatten(-1, (2, 48)).chunk(3, -1)
        return Projected(q, k, v, nn.functional.logsigmoid(layer.decay(hidden_states).float()))

    def finish(self, layer: Any, o: torch.Tensor, hidden_states: torch.Tensor, rest: Any) -> torch.Tensor:
        return layer.out(o.flatten(-2))


@pytest.fixture
def gated() -> Any:
    adapter = register_adapter(GatedAdapter())
    yield adapter
    del leet_hf.adapters._registry["gated"]


def test_an_adapter_from_outside(gated: Adapter) -> None:
    """Decays per token; decoding with a cache agrees with forwards without one."""
    assert adapters()[0] is gated
    torch.manual_seed(0)
    model = GatedModel(tiny.config("all-linear", num_hidden_layers=1, layer_types=[tiny.LINEAR])).eval()
    model.layers[0].self_attn = GatedAttention()
    patch_model(model)
    report = patch_report(model).layers
    assert [(layer.adapter, layer.decay, layer.status) for layer in report] == [("gated", "per token", "patched")]
    want = outputs(model)
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :18], use_cache=True))
        same(model(IDS[:, 18:], **{CACHE: cache}).last_hidden_state, want[:, 18:])
    assert not torch.allclose(want, outputs(unpatch_and_repatch_shifted(model)))


def unpatch_and_repatch_shifted(model: Any) -> Any:
    """The same model with other decays: they do matter."""
    unpatch_model(model)
    with torch.no_grad():
        model.layers[0].self_attn.decay.bias.add_(3)
    return patch_model(model)


def test_registering_what_is_no_adapter(gated: Adapter) -> None:
    with pytest.raises(TypeError, match="must be an instance, not the class"):
        register_adapter(GatedAdapter)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be an instance of leet_hf\.adapters\.Adapter"):
        register_adapter("gated")  # type: ignore[arg-type]
    other = type("Other", (GatedAdapter,), {})()
    with pytest.raises(ValueError, match=r"'gated' is registered already \(GatedAdapter\): choose another name"):
        register_adapter(other)
    assert register_adapter(gated) is gated


def test_public_names() -> None:
    for name in leet_hf.__all__:
        assert getattr(leet_hf, name) is not None
    assert set(leet_hf.__all__) <= set(dir(leet_hf))
    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        _ = leet_hf.patch_modle
