"""TransNormerLLM: linear attention in every layer, with trained relative positions in some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import decay as formulas
from ..hosts.head import HEAD_METHODS
from ..hosts.transnormer import transnormer_forward, transnormer_head_forward, transnormer_layer_forward
from ..shapes import RecurrentShape, SoftmaxShape
from ..slots import stored_tensor
from .base import Adapter, Decay, Projected
from .common import decay_of_slopes, lacks


class TransnormerAdapter(Adapter):
    """`NormLinearAttention` inside `TransnormerModel`, in remote code of OpenNLPLab's repositories.

    One projection to [q | k | v | u], an activation on q and k; in some layers LRPE, which makes [x cos, x sin] of x
    and so doubles the key dim; scale 1; RMSNorm over all heads, times u, then the output projection
    (`modeling_transnormer.py`). The base model holds the slopes and hands each layer its own, as an argument.
    """

    name = "transnormer"
    layer_class = "NormLinearAttention"
    base_class = "TransnormerModel"
    decay_formula = "-alibi_h * (1 - l/(L-1) + 1e-5)"
    base_forward = staticmethod(transnormer_forward)
    layer_forward = staticmethod(transnormer_layer_forward)
    head_methods = HEAD_METHODS | {"forward": transnormer_head_forward}

    def misfit(self, layer: Any) -> str | None:
        lacking = lacks(layer, ["qkvu_proj", "out_proj", "act", "norm", "num_heads"])
        if lacking is not None:
            return lacking
        made = getattr(layer.qkvu_proj, "out_features", None)
        if made is None or made % (4 * layer.num_heads):
            return f"its qkvu_proj gives {made} channels, no multiple of 4 times its {layer.num_heads} heads"
        if getattr(layer, "linear_use_lrpe", False):
            theta = getattr(getattr(layer, "lrpe", None), "theta", None)
            if theta is None:
                return "its linear_use_lrpe is set and it has no lrpe with a theta"
            if theta.numel() != made // 4:
                return f"its lrpe turns {theta.numel()} channels where its queries have {made // 4}"
        return None

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["embed_tokens", "embed_scale", "layers", "final_norm", "slopes", "num_layers", "config"])
        if lacking is None and base.num_layers != len(base.layers):
            return f"it has {len(base.layers)} layers and its num_layers, which slopes depend on, is {base.num_layers}"
        return lacking

    def attentions(self, base: Any) -> list[tuple[str, nn.Module]]:
        return [(f"layers.{i}.token_mixer", block.token_mixer) for i, block in enumerate(base.layers)]

    def index(self, layer: nn.Module) -> None:
        return None

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        heads = attention.num_heads
        dim = attention.qkvu_proj.out_features // (4 * heads)
        return RecurrentShape(heads, heads, heads, 2 * dim if attention.linear_use_lrpe else dim, dim)

    def decay(self, layer: Any) -> Decay:
        raise ValueError("the base model has the slopes of this layer: patch the base model, or a model with it")

    def decay_within(self, base: Any, layer: Any) -> Decay:
        """The formula; or the base model's slopes where they are not those of the formula."""
        layers = len(base.layers)
        index = next(i for i, (_, attention) in enumerate(self.attentions(base)) if attention is layer)
        formula = formulas.minimax_text_01(layer.num_heads, index, layers)
        return Decay(*decay_of_slopes(base.slopes, 1 - index / (layers - 1) + 1e-5, formula, self.decay_formula))

    def scale(self, layer: Any) -> float:
        return 1.0

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Tensor) -> Projected:
        """position_embeddings: positions [B, T] or [1, T]."""
        *qkv, u = layer.qkvu_proj(hidden_states).chunk(4, dim=-1)
        q, k, v = (x.unflatten(-1, (layer.num_heads, -1)) for x in qkv)
        q, k = layer.act(q), layer.act(k)
        if layer.linear_use_lrpe:
            wide = torch.promote_types(q.dtype, torch.float32)
            theta = stored_tensor(layer.lrpe, "theta").to(q.device, wide)[:, 0]  # [H, D]
            angles = position_embeddings[..., None, None].to(wide) * theta
            cos, sin = angles.cos(), angles.sin()
            q, k = (torch.cat([x * cos, x * sin], dim=-1).to(x.dtype) for x in (q, k))
        return Projected(q, k, v, rest=u)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Tensor) -> Tensor:
        return layer.out_proj(rest * layer.norm(o.flatten(-2)))
