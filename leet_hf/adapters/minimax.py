"""MiniMax as in transformers (model type `minimax`): lightning attention between softmax layers, and experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import decay as formulas
from ..fused.glu import activation_name
from ..fused.norms import gated_norm
from ..fused.silu_split import silu_split, split_again
from ..host import LINEAR, decoder_forward
from ..shapes import RecurrentShape, SoftmaxShape
from ..slots import stored_tensor
from .base import Adapter, Decay, Projected
from .common import agree, lacks


class MiniMaxAdapter(Adapter):
    """`MiniMaxLightningAttention` inside `MiniMaxModel`.

    One packed projection, SiLU over all of it, then per head [q | k | v]; no rope, scale 1; RMSNorm over all heads,
    times the sigmoid of a gate, then the output projection (transformers' modeling_minimax.py).
    """

    name = "minimax"
    layer_class = "MiniMaxLightningAttention"
    base_class = "MiniMaxModel"
    decay_formula = "-2^(-8(h+1)/H) * (1 - l/(L-1+1e-5) + 1e-5)"
    base_forward = staticmethod(decoder_forward)

    def misfit(self, layer: nn.Module) -> str | None:
        needed = (
            "qkv_proj", "act_fn", "norm", "output_gate", "out_proj", "slope_rate",
            "head_dim", "num_attention_heads", "num_hidden_layers", "layer_idx",
        )  # fmt: skip
        return lacks(layer, needed)

    def base_misfit(self, base: nn.Module) -> str | None:
        lacking = lacks(base, ("embed_tokens", "layers", "norm", "rotary_emb", "config"))
        if lacking is not None:
            return lacking
        config: Any = base.config
        attentions = self.attentions(base)
        if config.num_hidden_layers != len(attentions):
            return f"it has {len(attentions)} layers and its config.num_hidden_layers is {config.num_hidden_layers}"
        for (path, attention), kind in zip(attentions, config.layer_types, strict=False):
            if self.owns_layer(attention) != (kind == LINEAR):
                return f"its {path} is a {type(attention).__name__} where config.layer_types says {kind!r}"
        return None

    def index(self, layer: nn.Module) -> int:
        return int(layer.layer_idx)  # type: ignore[arg-type]

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        if self.owns_layer(attention):
            heads, dim = attention.num_attention_heads, attention.head_dim
            return RecurrentShape(heads, heads, heads, dim, dim)
        return SoftmaxShape(attention.config.num_key_value_heads, attention.head_dim)

    def decay(self, layer: nn.Module) -> Decay:
        """The formula; or the module's own slopes where they are not the formula's: pruned or reordered layers."""
        heads, index, layers = layer.num_attention_heads, layer.layer_idx, layer.num_hidden_layers
        formula = formulas.minimax(heads, index, layers)  # type: ignore[arg-type]
        slopes = stored_tensor(layer, "slope_rate").double().flatten().tolist()
        if len(slopes) != len(formula):
            raise ValueError(
                f"slope_rate has {len(slopes)} entries for {len(formula)} heads: give the layer one slope per head"
            )
        if agree([-slope for slope in slopes], formula):
            return Decay(formula, f"formula {self.decay_formula}")
        if not all(0 <= slope < float("inf") for slope in slopes):
            raise ValueError("slope_rate holds a negative, infinite or NaN slope: load the layer's buffers again")
        return Decay(tuple(-slope for slope in slopes), "buffer slope_rate, which is not the formula's")

    def scale(self, layer: nn.Module) -> float:
        return 1.0

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        packed = layer.qkv_proj(hidden_states)
        if activation_name(layer.act_fn) == "silu":
            again = split_again(packed, layer.head_dim)
            return Projected(*silu_split(packed, layer.head_dim, method=layer._leet.method), again=again)
        q, k, v = layer.act_fn(packed).unflatten(-1, (-1, 3 * layer.head_dim)).chunk(3, dim=-1)
        return Projected(q, k, v)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        gate = layer.output_gate(hidden_states)
        return layer.out_proj(gated_norm(layer.norm, o.flatten(-2), gate, "sigmoid", method=layer._leet.method))
