"""Ring / Ling linear 2.0 and 2.5: Lightning attention between softmax or latent attention layers, and experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .. import decay as formulas
from ..fused.norms import gated_norm
from ..fused.rotary import turned
from ..hosts.bailing import bailing_forward, bailing_layer_forward
from ..hosts.tables import frequencies_lack
from ..shapes import RecurrentShape, SoftmaxShape
from ..slots import stored_tensor
from .base import Adapter, Decay, Projected
from .common import agree, is_a, lacks

CLASSES = ("BailingMoeV2LinearAttention", "BailingMoeV2_5LinearAttention")


class BailingAdapter(Adapter):
    """`BailingMoeV2LinearAttention` and `BailingMoeV2_5LinearAttention`, in remote code of inclusionAI's repositories.

    One projection, laid out as all q, then all k, then all v; RMSNorm of q and k per head, rope on the first
    channels, scale D^-0.5; RMSNorm over groups of channels, times the sigmoid of a gate, then the output projection
    (inclusionAI's `modeling_bailing_moe_v2_5.py`).
    """

    name = "bailing"
    layer_class = " or ".join(CLASSES)
    base_class = "BailingMoeV2Model or BailingMoeV2_5Model"
    decay_formula = "-alibi_h * (1 - (l-1)/(L-1) + 1e-5)"
    base_forward = staticmethod(bailing_forward)
    layer_forward = staticmethod(bailing_layer_forward)

    def owns_layer(self, module: nn.Module) -> bool:
        return any(is_a(module, name) for name in CLASSES)

    def owns_base(self, module: nn.Module) -> bool:
        """By structure: the published base models have several names."""
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            return False
        return any(self.owns_layer(getattr(block, "attention", block)) for block in layers)

    def misfit(self, layer: Any) -> str | None:
        needed = [
            "query_key_value", "dense", "g_proj", "g_norm", "slope",
            "num_heads", "num_key_value_heads", "head_dim", "layer_idx", "config",
        ]  # fmt: skip
        lacking = lacks(layer, needed)
        if lacking is None and getattr(layer.config, "use_qk_norm", False):
            lacking = lacks(layer, ["query_layernorm", "key_layernorm"])
        if lacking is not None:
            return lacking
        if layer.num_heads % layer.num_key_value_heads:
            return f"its {layer.num_heads} heads are no multiple of its {layer.num_key_value_heads} key-value heads"
        wide = (layer.num_heads + 2 * layer.num_key_value_heads) * layer.head_dim
        made = getattr(layer.query_key_value, "out_features", wide)
        if made != wide:
            return f"its query_key_value gives {made} channels where its heads need {wide}"
        if getattr(layer.config, "linear_silu", False) and not is_a(layer, CLASSES[0]):
            return "its config.linear_silu is set, which the published forward of this class does not read"
        return None

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["word_embeddings", "layers", "norm", "rotary_emb", "config"])
        if lacking is not None:
            return lacking
        count = base.config.num_hidden_layers
        if len(base.layers) < count:
            return f"it has {len(base.layers)} layers and its config.num_hidden_layers is {count}"
        for path, attention in self.attentions(base):
            lacking = None if self.owns_layer(attention) else _softmax_lacks(attention)
            if lacking is not None:
                return f"its {path} is a {type(attention).__name__} and {lacking}"
            if hasattr(attention, "qk_head_dim") and not hasattr(base, "rotary_emb_mla"):
                return f"its {path} is a {type(attention).__name__} and it has no rotary_emb_mla"
        return frequencies_lack(base, "rotary_emb") or frequencies_lack(base, "rotary_emb_mla")

    def attentions(self, base: Any) -> list[tuple[str, nn.Module]]:
        """Without the layers after them, which predict further tokens."""
        blocks = list(base.layers)[: base.config.num_hidden_layers]
        return [(f"layers.{i}.attention", block.attention) for i, block in enumerate(blocks)]

    def index(self, layer: nn.Module) -> int:
        return int(layer.layer_idx)  # type: ignore[arg-type]

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        if self.owns_layer(attention):
            heads, few, dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
            return RecurrentShape(heads, few, few, dim, dim)
        if hasattr(attention, "qk_head_dim"):  # latent attention, which caches whole heads
            return SoftmaxShape(attention.num_heads, attention.qk_head_dim)
        return SoftmaxShape(attention.num_key_value_heads, attention.head_dim)

    def decay(self, layer: Any) -> Decay:
        """The module's own slopes. Where a cast has rounded them to 16 bits, the formula they are of, if they are.

        And the formula where they are no decays at all: the published buffer is in no checkpoint, and transformers
        fills such buffers with whatever was in memory, unless the remote code sees to it.
        """
        slope = stored_tensor(layer, "slope")
        log_decays = tuple(slope.detach().double().flatten().tolist())
        if len(log_decays) != layer.num_heads:
            raise ValueError(
                f"slope has {len(log_decays)} entries for {layer.num_heads} heads: give the layer one slope per head"
            )
        sound = all(-math.inf < g < 0 for g in log_decays)
        layers = getattr(layer.config, "num_hidden_layers", 0)
        if layers > 1:
            formula = formulas.bailing(layer.num_heads, layer.layer_idx, layers)
            if not sound and "slope" in layer._non_persistent_buffers_set:
                return Decay(formula, f"formula {self.decay_formula}, as loading has left the buffer slope unfilled")
            if agree(log_decays, formula):
                kept = formula if slope.dtype in (torch.float16, torch.bfloat16) else log_decays
                return Decay(kept, f"buffer slope, formula {self.decay_formula}")
        if not sound:
            raise ValueError("slope holds an entry that is not negative and finite: load the layer's buffers again")
        return Decay(log_decays, "buffer slope, which is not the published formula's")

    def scale(self, layer: Any) -> float:
        return layer.head_dim**-0.5

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        packed = layer.query_key_value(hidden_states)
        if getattr(layer.config, "linear_silu", False):
            packed = silu(packed)
        few = layer.num_key_value_heads
        q, k, v = packed.unflatten(-1, (-1, layer.head_dim)).split([layer.num_heads, few, few], dim=-2)
        if getattr(layer.config, "use_qk_norm", False):
            q, k = layer.query_layernorm(q), layer.key_layernorm(k)
        cos, sin = (x.unsqueeze(-2) for x in position_embeddings)  # [B, T, 1, rotary channels]
        return Projected(*turned(q, k, cos, sin, "rope_twice", method=layer._leet.method), v)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        gate = layer.g_proj(hidden_states)
        return layer.dense(gated_norm(layer.g_norm, o.flatten(-2), gate, "sigmoid", method=layer._leet.method))


def _softmax_lacks(attention: nn.Module) -> str | None:
    if hasattr(attention, "qk_head_dim"):
        return lacks(attention, ["num_heads"])
    return lacks(attention, ["num_key_value_heads", "head_dim"])
