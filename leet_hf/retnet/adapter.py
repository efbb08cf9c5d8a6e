"""Our own RetNet as a family: no patching needed, the same path through `attend`, and a row in patch_report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import decay as formulas
from ..adapters.base import Adapter, Decay, Projected
from ..host import decoder_forward
from ..shapes import RecurrentShape, SoftmaxShape

if TYPE_CHECKING:
    from .retention import RetNetRetention

FORMULAS = {
    "retnet": (formulas.retnet, "1 - 2^(-5-h)"),
    "retnet_language_model": (formulas.retnet_language_model, "1 - exp(linspace(log 1/32, log 1/512, H))"),
}


class RetNetAdapter(Adapter):
    """`leet_hf.retnet`: the modules project and finish themselves and carry their binding from the beginning."""

    name = "retnet"
    layer_class = "RetNetRetention"
    base_class = "RetNetModel"
    decay_formula = "log(1 - 2^(-5-h))"
    base_forward = staticmethod(decoder_forward)  # never put on: the model's own forward is right
    native = True  # nothing to patch, nothing to take off

    def misfit(self, layer: nn.Module) -> str | None:
        return None

    def base_misfit(self, base: nn.Module) -> str | None:
        return None

    def index(self, layer: Any) -> int:
        return layer.layer_idx

    def attentions(self, base: Any) -> list[tuple[str, nn.Module]]:
        return [(f"layers.{i}.attn", block.attn) for i, block in enumerate(base.layers)]

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        return attention.cache_shape

    def decay(self, layer: RetNetRetention) -> Decay:  # type: ignore[override]
        formula, words = FORMULAS[layer.config.decay]
        return Decay(formula(layer.config.num_heads), f"formula log({words})")

    def scale(self, layer: Any) -> float:
        return layer.scaling

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        return layer.project(hidden_states, position_embeddings)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        return layer.finish(o, hidden_states, rest)
