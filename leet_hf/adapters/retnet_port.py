"""RetNet of torchscale as ported to transformers (syncdoth/RetNet): `MultiScaleRetention` inside `RetNetModel`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leet_linear_attention.checks import MAX_HEAD_DIM

from .. import decay as formulas
from ..fused.rotary import turned
from ..hosts.retnet_port import PORT_HEAD_METHODS, THETA, Turns, port_forward, port_layer_forward
from ..retnet.positions import rotary_angles
from ..shapes import RecurrentShape, SoftmaxShape
from ..slots import stored_tensor
from .base import Adapter, Decay, Projected
from .common import agree, is_a, lacks
from .retnet_fla import has_parts_of_fla

FORMULAS = {
    "log(1 - 2^(-5-h))": formulas.retnet,
    "log(1 - exp(linspace(log 1/32, log 1/512, H)))": formulas.retnet_language_model,
}


class PortRetNetAdapter(Adapter):
    """`MultiScaleRetention` of the port, inside a `RetNetModel` that holds decays and angles in `retnet_rel_pos`.

    q and k turned by pairs of neighbours, scale K^-0.5; scores divided by the root of the decay so far and by their
    clamped sum; RMSNorm per head without a weight, times a gate, then the output projection (`modeling_retnet.py`). The
    two divisions cancel in the norm, up to its eps: to be right to rounding, the values have a column of ones, whose
    output is the sum of scores.
    """

    name = "retnet-port"
    layer_class = "MultiScaleRetention"
    base_class = "RetNetModel (port of torchscale)"
    decay_formula = " or ".join(FORMULAS)
    base_forward = staticmethod(port_forward)
    layer_forward = staticmethod(port_layer_forward)
    head_methods = PORT_HEAD_METHODS

    def owns_layer(self, module: nn.Module) -> bool:
        """By its class, and by having nothing of what FLA's has."""
        return is_a(module, self.layer_class) and not has_parts_of_fla(module)

    def owns_base(self, module: nn.Module) -> bool:
        """By its class and by the retention in its blocks."""
        return is_a(module, "RetNetModel") and any(
            self.owns_layer(getattr(block, "retention", block)) for block in getattr(module, "layers", ())
        )

    def misfit(self, layer: Any) -> str | None:
        needed = [
            "q_proj", "k_proj", "v_proj", "g_proj", "out_proj", "group_norm", "gate_fn",
            "num_heads", "key_dim", "head_dim", "scaling",
        ]  # fmt: skip
        return lacks(layer, needed)

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["embed_tokens", "forward_embedding", "layers", "retnet_rel_pos", "config"])
        if lacking is None and not hasattr(base, "layer_norm"):
            lacking = "it has no layer_norm, not even None"
        if lacking is not None:
            return lacking
        lacking = lacks(base.retnet_rel_pos, ["angle", "decay"])
        return None if lacking is None else f"of its retnet_rel_pos, {lacking}"

    def attentions(self, base: Any) -> list[tuple[str, nn.Module]]:
        return [(f"layers.{i}.retention", block.retention) for i, block in enumerate(base.layers)]

    def index(self, layer: nn.Module) -> None:
        return None

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        heads, (parts, width) = attention.num_heads, _parts(attention.head_dim)
        return RecurrentShape(parts * heads, heads, parts * heads, attention.key_dim, width)

    def decay(self, layer: Any) -> Decay:
        raise ValueError("the base model has the decays of this layer: patch the base model, or a model with it")

    def decay_within(self, base: Any, layer: Any) -> Decay:
        """The formula; or the base model's buffer where it is of none."""
        decay, angle = (stored_tensor(base.retnet_rel_pos, name) for name in ("decay", "angle"))
        for name, buffer in (("decay", decay), ("angle", angle)):
            if buffer.device.type == "meta":
                raise ValueError(f"retnet_rel_pos.{name} is on the meta device: load the weights first, then patch")
        turned = rotary_angles(layer.key_dim, THETA, "theta_shift", torch.device("cpu")).repeat_interleave(2)
        if angle.numel() != len(turned) or not agree(angle.flatten().tolist(), turned.tolist()):
            raise ValueError("retnet_rel_pos.angle is not 10000^-linspace(0, 1, K/2), each twice: other rotations")
        held = tuple(decay.detach().double().flatten().tolist())
        if len(held) != layer.num_heads:
            raise ValueError(f"retnet_rel_pos.decay has {len(held)} entries for {layer.num_heads} heads")
        if not all(-math.inf < g <= 0 for g in held):
            raise ValueError("retnet_rel_pos.decay holds an entry that is positive, infinite or NaN: load it again")
        parts, _ = _parts(layer.head_dim)
        for words, formula in FORMULAS.items():
            if agree(held, formula(layer.num_heads)):
                return Decay(_repeated(formula(layer.num_heads), parts), f"formula {words}")
        return Decay(_repeated(held, parts), "buffer retnet_rel_pos.decay, which is of no published formula")

    def scale(self, layer: Any) -> float:
        return layer.scaling

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Turns) -> Projected:
        cos, sin, sums = position_embeddings
        q, k, v = (
            proj(hidden_states).unflatten(-1, (layer.num_heads, -1))
            for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = turned(q, k, cos, sin, "theta_shift", method=layer._leet.method)
        parts, width = _parts(layer.head_dim)
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        v = F.pad(v, (0, parts * width - v.shape[-1])).unflatten(-1, (parts, width)).flatten(2, 3)
        return Projected(q, k, v, rest=sums)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Tensor) -> Tensor:
        parts, _ = _parts(layer.head_dim)
        o = o.to(rest.dtype).unflatten(2, (layer.num_heads, parts)).flatten(3) * rest.rsqrt()
        scores = o[..., layer.head_dim : layer.head_dim + 1].detach().abs().clamp(min=1)
        o = layer.group_norm(o[..., : layer.head_dim] / scores).flatten(2).to(hidden_states.dtype)
        return layer.out_proj(layer.gate_fn(layer.g_proj(hidden_states)) * o)


def _parts(value_dim: int) -> tuple[int, int]:
    """Into how many state heads one with values and a column of ones is cut, and how wide they are."""
    parts = -(-(value_dim + 1) // MAX_HEAD_DIM)
    return parts, -(-(value_dim + 1) // parts)


def _repeated(log_decays: tuple[float, ...], parts: int) -> tuple[float, ...]:
    return tuple(g for g in log_decays for _ in range(parts))
