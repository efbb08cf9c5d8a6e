"""RetNet of the package flash-linear-attention (FLA): `MultiScaleRetention` inside `RetNetModel`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import decay as formulas
from ..fused.rotary import turned
from ..hosts.head import HEAD_METHODS
from ..hosts.retnet_fla import fla_forward, fla_head_forward, fla_layer_forward, fla_softmax_forward
from ..shapes import RecurrentShape, SoftmaxShape
from .base import Adapter, Decay, Projected
from .common import is_a, lacks


class FlaRetNetAdapter(Adapter):
    """`fla.layers.MultiScaleRetention` inside `fla.models.RetNetModel`.

    q and k with rope (not xPos), perhaps a feature map before it, fewer heads for k and v than for q; scale K^-0.5;
    RMSNorm per head and a gate, in one module or in two (the sources of flash-linear-attention 0.6.0). Softmax layers
    (`config.attn`) are made to use standard caches. The port of torchscale's RetNet has classes of the same names; this
    one has `attn` in its blocks, the other `retention`.
    """

    name = "retnet-fla"
    layer_class = "MultiScaleRetention"
    base_class = "RetNetModel (flash-linear-attention)"
    decay_formula = "log(1 - 2^(-5-h))"
    base_forward = staticmethod(fla_forward)
    layer_forward = staticmethod(fla_layer_forward)
    softmax_forward = staticmethod(fla_softmax_forward)
    head_methods = HEAD_METHODS | {"forward": fla_head_forward}

    def owns_layer(self, module: nn.Module) -> bool:
        """By its class, and by what FLA's has and the port's has not."""
        return is_a(module, self.layer_class) and has_parts_of_fla(module)

    def owns_base(self, module: nn.Module) -> bool:
        """By its class and by the retention in its blocks."""
        return is_a(module, "RetNetModel") and any(
            self.owns_layer(getattr(block, "attn", block)) for block in getattr(module, "layers", ())
        )

    def misfit(self, layer: Any) -> str | None:
        needed = [
            "q_proj", "k_proj", "v_proj", "o_proj", "rotary",
            "num_heads", "num_kv_heads", "head_k_dim", "head_v_dim", "layer_idx",
        ]  # fmt: skip
        fused, gated = getattr(layer, "fuse_norm_and_gate", False), getattr(layer, "use_output_gate", False)
        needed += ["g_norm_swish_gate"] if fused else ["g_norm"]
        needed += ["g_proj"] if gated else []
        needed += ["gate_fn"] if gated and not fused else []
        lacking = lacks(layer, needed)
        if lacking is not None:
            return lacking
        if getattr(layer, "use_short_conv", False):
            return "it has short convolutions, whose states a recurrent layer of a cache does not hold"
        if layer.num_heads % layer.num_kv_heads:
            return f"its {layer.num_heads} heads are no multiple of its {layer.num_kv_heads} key-value heads"
        return _rotary_misfit(layer.rotary, layer.head_k_dim)

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["embeddings", "layers", "norm", "config"])
        if lacking is not None:
            return lacking
        if getattr(base, "use_attnres", False):
            return "its config.attnres_block_size is set, attention over residuals, which is not served"
        count = base.config.num_hidden_layers
        if len(base.layers) != count:
            return f"it has {len(base.layers)} layers and its config.num_hidden_layers is {count}"
        attentions: list[tuple[str, Any]] = self.attentions(base)
        retentions = [attention for _, attention in attentions if self.owns_layer(attention)]
        for path, attention in attentions:
            if not self.owns_layer(attention):
                reason = _softmax_misfit(attention)
                if reason is not None:
                    return f"its {path} is a {type(attention).__name__} and {reason}"
            elif attention.rotary.base != retentions[0].rotary.base:
                return f"its {path} has another rotary.base than its first retention"
        return None

    def attentions(self, base: Any) -> list[tuple[str, nn.Module]]:
        return [(f"layers.{i}.attn", block.attn) for i, block in enumerate(base.layers)]

    def index(self, layer: Any) -> int:
        return int(layer.layer_idx)

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        few = attention.num_kv_heads
        if not self.owns_layer(attention):
            return SoftmaxShape(few, attention.head_dim)
        return RecurrentShape(attention.num_heads, few, few, attention.head_k_dim, attention.head_v_dim)

    def decay(self, layer: Any) -> Decay:
        return Decay(formulas.retnet(layer.num_heads), f"formula {self.decay_formula}")

    def scale(self, layer: Any) -> float:
        return layer.head_k_dim**-0.5

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        q, k = (proj(hidden_states).unflatten(-1, (-1, layer.head_k_dim)) for proj in (layer.q_proj, layer.k_proj))
        v = layer.v_proj(hidden_states).unflatten(-1, (-1, layer.head_v_dim))
        if getattr(layer, "feature_map_fn", None) is not None:
            q, k = layer.feature_map_fn(q), layer.feature_map_fn(k)
        cos, sin = position_embeddings
        return Projected(*turned(q, k, cos, sin, method=layer._leet.method), v)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        if layer.fuse_norm_and_gate:
            gate = layer.g_proj(hidden_states).unflatten(-1, (-1, layer.head_v_dim))
            return layer.o_proj(layer.g_norm_swish_gate(o, gate).flatten(-2))
        o = layer.g_norm(o).flatten(-2)
        if layer.use_output_gate:
            o = o * layer.gate_fn(layer.g_proj(hidden_states))
        return layer.o_proj(o)


def has_parts_of_fla(retention: nn.Module) -> bool:
    """Whether a MultiScaleRetention is FLA's, perhaps with a part missing: the port calls none of its parts so."""
    return hasattr(retention, "o_proj") or hasattr(retention, "rotary")


def _softmax_misfit(attention: Any) -> str | None:
    needed = ["q_proj", "k_proj", "v_proj", "o_proj", "rotary", "num_heads", "num_kv_heads", "head_dim"]
    needed += ["q_norm", "k_norm"] if getattr(attention, "qk_norm", False) else []
    lacking = lacks(attention, needed)
    if lacking is not None:
        return lacking
    if getattr(attention, "window_size", None) is not None:
        return f"its window_size is {attention.window_size}: windows of softmax layers are not served"
    return _rotary_misfit(attention.rotary, attention.head_dim)


def _rotary_misfit(rotary: Any, dim: int) -> str | None:
    """FLA's rotary module has options that its retention does not use."""
    lacking = lacks(rotary, ["dim", "base"])
    if lacking is not None:
        return f"of its rotary, {lacking}"
    if rotary.dim != dim:
        return f"its rotary turns {rotary.dim} channels of heads of {dim}"
    if getattr(rotary, "interleaved", False) or getattr(rotary, "scale_base", None) is not None:
        return "its rotary interleaves channels or scales them (xPos)"
    if not getattr(rotary, "pos_idx_in_fp32", True):
        return "its rotary counts positions in 16 bits (pos_idx_in_fp32 is False)"
    return None
