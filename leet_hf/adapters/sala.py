"""MiniCPM-SALA and HypeNet: lightning attention between softmax or block-sparse attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import decay as formulas
from ..fused.norms import gated_norm
from ..fused.rotary import turned
from ..hosts.head import HEAD_METHODS
from ..hosts.lightning import (
    Dialect,
    lightning_forward,
    lightning_layer_forward,
    softmax_in_context,
    token_places,
)
from ..hosts.remote import bounds_of
from ..hosts.softmax import softmax_forward
from ..hosts.sparse import is_sparse, layer_class, sparse_arguments
from ..hosts.tables import frequencies_lack, tables_lack, turned_by_tables
from ..shapes import RecurrentShape, SoftmaxShape
from .base import Adapter, Decay, Projected
from .common import lacks

LIGHTNING = ("lightning-attn", "lightning_attn", "lightning")


class _LightningAdapter(Adapter):
    """`LightningAttention` with projections q, k, v, o and optional norms, rope and gate, as its own flags say.

    RMSNorm of q and k per head, rope on whole heads, a scale that the module keeps; RMSNorm over all heads, times the
    sigmoid of a gate, then the output projection.
    """

    layer_class = "LightningAttention"
    decay_formula = "-alibi_h"
    base_forward = staticmethod(lightning_forward)
    layer_forward = staticmethod(lightning_layer_forward)
    dialect: Dialect

    def owns_layer(self, module: nn.Module) -> bool:
        """By the name and the flags of the published class: others have its name too."""
        flags = ("use_rope", "qk_norm", "use_output_norm", "use_output_gate")
        return super().owns_layer(module) and all(hasattr(module, flag) for flag in flags)

    def misfit(self, layer: Any) -> str | None:
        needed = ["q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "num_key_value_heads", "head_dim"]
        needed += ["scale", "layer_idx"]
        needed += ["q_norm", "k_norm"] if layer.qk_norm else []
        needed += ["o_norm"] if layer.use_output_norm else []
        needed += ["z_proj"] if layer.use_output_gate else []
        lacking = lacks(layer, needed)
        if lacking is not None:
            return lacking
        if getattr(layer, "use_short_conv", False):
            return "its use_short_conv is set, and convolutions keep states that caches here do not hold"
        heads, few = layer.num_attention_heads, layer.num_key_value_heads
        if heads % few:
            return f"its {heads} heads are no multiple of its {few} key-value heads"
        for name, count in (("q_proj", heads), ("k_proj", few), ("v_proj", few)):
            made = getattr(getattr(layer, name), "out_features", count * layer.head_dim)
            if made != count * layer.head_dim:
                return f"its {name} gives {made} channels where its heads need {count * layer.head_dim}"
        return None

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["embed_tokens", "layers", "norm", "config"])
        if lacking is not None:
            return lacking
        if base.config.num_hidden_layers != len(base.layers):
            return (
                f"it has {len(base.layers)} layers and its config.num_hidden_layers is {base.config.num_hidden_layers}"
            )
        if getattr(base.config, "sliding_window", None) is not None:
            return (
                f"its config.sliding_window is {base.config.sliding_window}, which would make caches forget what its "
                "softmax layers see: set it to None"
            )
        mixers = getattr(base.config, "mixer_types", None) or [None] * len(base.layers)
        for (path, attention), mixer in zip(self.attentions(base), mixers, strict=False):
            owned = self.owns_layer(attention)
            if mixer is not None and owned != (mixer in LIGHTNING):
                return f"its {path} is a {type(attention).__name__} where config.mixer_types says {mixer!r}"
            reason = None if owned else self.softmax_misfit(attention)
            if reason is not None:
                return f"its {path} is a {type(attention).__name__} and {reason}"
        return None

    def softmax_misfit(self, attention: Any) -> str | None:
        """As `misfit`, for an attention module that is no lightning attention."""
        raise NotImplementedError

    def index(self, layer: nn.Module) -> int:
        return int(layer.layer_idx)  # type: ignore[arg-type]

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        if self.owns_layer(attention):
            heads, few, dim = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
            return RecurrentShape(heads, few, few, dim, dim)
        config = attention.config
        return SoftmaxShape(config.num_key_value_heads, attention.head_dim)

    def decay(self, layer: Any) -> Decay:
        return Decay(formulas.alibi(layer.num_attention_heads), f"formula {self.decay_formula}")

    def scale(self, layer: Any) -> float:
        return float(layer.scale)

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, layer.head_dim))
            for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if layer.qk_norm:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if layer.use_rope:
            q, k = self.turn(layer, q, k, position_embeddings)
        return Projected(q, k, v)

    def turn(self, layer: Any, q: Tensor, k: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        """q and k [B, T, heads, D] turned by their places."""
        raise NotImplementedError

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        o = o.flatten(-2)
        if layer.use_output_norm and layer.use_output_gate:
            gate = layer.z_proj(hidden_states)
            return layer.o_proj(gated_norm(layer.o_norm, o, gate, "sigmoid", method=layer._leet.method))
        if layer.use_output_norm:
            o = layer.o_norm(o)
        if layer.use_output_gate:
            o = o * torch.sigmoid(layer.z_proj(hidden_states))
        return layer.o_proj(o)


def _scaled_embedding(base: Any, input_ids: Tensor) -> Tensor:
    return base.embed_tokens(input_ids) * base.config.scale_emb


def _sala_softmax(base: Any, ready: Any, turns: Any, attention_mask: Any) -> dict[str, Any]:
    attentions = [(i, layer.self_attn) for i, layer in enumerate(base.layers) if is_sparse(layer.self_attn)]
    if attentions:
        return sparse_arguments(attentions, ready, attention_mask)
    return softmax_in_context(base, ready, turns, attention_mask)


class SalaAdapter(_LightningAdapter):
    """Inside `MiniCPMSALAModel`, in remote code of openbmb's repositories (`modeling_minicpm_sala.py`).

    Each attention has rope tables of its own. Softmax layers are made to use standard caches and masks; block-sparse
    ones keep their forward, and get what they want from `leet_hf.hosts.sparse`.
    """

    name = "minicpm_sala"
    base_class = "MiniCPMSALAModel"
    softmax_forward = staticmethod(softmax_forward)
    head_methods = HEAD_METHODS
    dialect = Dialect(turns=token_places, softmax=_sala_softmax, embed=_scaled_embedding)

    def misfit(self, layer: Any) -> str | None:
        return super().misfit(layer) or (tables_lack(getattr(layer, "rotary_emb", None)) if layer.use_rope else None)

    def owns_softmax(self, attention: nn.Module) -> bool:
        return super().owns_softmax(attention) and not is_sparse(attention)

    def base_misfit(self, base: Any) -> str | None:
        reason = super().base_misfit(base) or lacks(base.config, ["scale_emb"])
        softmax = [attention for _, attention in self.attentions(base) if not self.owns_layer(attention)]
        if reason is None and len({is_sparse(attention) for attention in softmax}) > 1:
            return "some of its softmax layers are block-sparse and some are not"
        return reason

    def softmax_misfit(self, attention: Any) -> str | None:
        if is_sparse(attention):
            missing = None if layer_class(attention) else "there is no InfLLMv2CacheLayer beside its class"
            lacking = lacks(attention, ["dense_len", "head_dim", "config"]) or missing
            turns = lacking is None and getattr(attention.config, "attn_use_rope", True)
            return tables_lack(getattr(attention, "rotary_emb", None), read=True) if turns else lacking
        if not any(cls.__name__ == "MiniCPMAttention" for cls in type(attention).__mro__):
            return "neither lightning nor softmax attention as published"
        needed = ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "config", "attention_dropout"]
        lacking = lacks(attention, needed + (["o_gate"] if getattr(attention, "use_output_gate", False) else []))
        turns = getattr(attention.config, "attn_use_rope", True)
        return lacking or (tables_lack(getattr(attention, "rotary_emb", None)) if turns else None)

    def turn(self, layer: Any, q: Tensor, k: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        return turned_by_tables(q, k, layer.rotary_emb, position_embeddings, method=layer._leet.method)


class _Facade:
    """A standard cache, called as HypeNet's own: its softmax layers hand over keys and values as one."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, attn_state: tuple[Tensor, Tensor], layer_idx: int, **kwargs: Any) -> dict[str, Any]:
        return {"attn_state": self._cache.update(*attn_state, layer_idx)}


def _shared_turns(base: Any, ready: Any) -> Any:
    return base.rotary_emb(ready.hidden_states, ready.position_ids)


def _hypenet_softmax(base: Any, ready: Any, turns: Any, attention_mask: Any) -> dict[str, Any]:
    own = {"attention_mask": ready.masks["full_attention"], "position_embeddings": turns}
    return own | bounds_of(ready) | {"past_key_values": None if ready.cache is None else _Facade(ready.cache)}


class HypeNetAdapter(_LightningAdapter):
    """Inside `HypeNetModel`, in code of thunlp/hybrid-linear-attention: one rope for all layers."""

    name = "hypenet"
    base_class = "HypeNetModel"
    dialect = Dialect(turns=_shared_turns, softmax=_hypenet_softmax, cache_name="past_key_values")

    def base_misfit(self, base: Any) -> str | None:
        return super().base_misfit(base) or lacks(base, ["rotary_emb"]) or frequencies_lack(base, "rotary_emb")

    def softmax_misfit(self, attention: Any) -> str | None:
        if not any(cls.__name__ == "Qwen3Attention" for cls in type(attention).__mro__):
            return "neither lightning nor softmax attention: it keeps states that caches here do not hold"
        return lacks(attention, ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "config"])

    def turn(self, layer: Any, q: Tensor, k: Tensor, position_embeddings: Any) -> tuple[Tensor, Tensor]:
        cos, sin = (table.unsqueeze(-2) for table in position_embeddings)
        return turned(q, k, cos, sin, "rope_twice", method=layer._leet.method)
