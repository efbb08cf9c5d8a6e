"""Softmax attention with rotary positions, for the layers that config.attn names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..fused.rotary import turned
from ..shapes import SoftmaxShape
from ..versions import cache_argument
from .configuration_retnet import RetNetConfig
from .positions import Positions, softmax_tables


class RetNetAttention(nn.Module):
    """Causal softmax attention of a hybrid model; names of flash-linear-attention's `Attention`."""

    is_causal = True

    def __init__(self, config: RetNetConfig, layer_idx: int, spec: dict[str, Any]) -> None:
        """spec: one entry of `config.attn`, with all its keys."""
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads = spec["num_heads"], spec["num_kv_heads"]
        self.head_dim = config.hidden_size // heads
        self.turns = self.head_dim, float(spec["rope_theta"])  # what its rotary tables depend on
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.cache_shape = SoftmaxShape(kv_heads, self.head_dim)
        hidden, bias = config.hidden_size, spec["qkv_bias"]
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Positions | None,
        position_ids: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, hidden] to (the same, attention weights where the implementation gives them)."""
        tables = None if position_embeddings is None else position_embeddings.softmax.get(self.turns)
        cos, sin = softmax_tables(*self.turns, position_ids, hidden_states) if tables is None else tables
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, k, cos, sin, method=self.config.method)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        past = cache_argument(past_key_values, cache)
        if past is not None:
            k, v = past.update(k, v, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        o, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(o.flatten(-2)), weights


def eager_attention(
    module: RetNetAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with its weights: query [B, H, T, D], key and value [B, Hkv, S, D], an additive mask or None."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights
