"""Softmax attention of remote code whose own forward knows only caches of its host, with standard caches and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..versions import cache_argument
from .tables import Places, places, turned_by_tables

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@dataclass
class SoftmaxBinding:
    """What patching puts on such a layer: the adapter, its place among the layers, how to take it off again."""

    adapter: Adapter
    index: int
    had_entry: bool = False

    @property
    def forward(self) -> Callable[..., Any]:
        """What replaces the layer's forward."""
        assert self.adapter.softmax_forward is not None
        return self.adapter.softmax_forward


class SoftmaxContext(NamedTuple):
    """What such a layer needs of a forward, in the place of the mask, which its decoder layer hands on unread.

    mask: what the attention function takes. implementation: its name. bounds: of packed sequences, for flash attention.
    """

    mask: Any
    where: Places
    implementation: str
    bounds: dict[str, Any]


def softmax_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    attn_mask: Any = None,
    past_key_values: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a softmax layer with projections q, k, v, o and rope by tables. Returns also the cache.

    Rope is left out where the config's `attn_use_rope` says so; a gate `o_gate` acts where there is one. attention_mask
    or attn_mask: a SoftmaxContext from the base forward, or a mask where the decoder layer is called alone.
    """
    past = past_key_value if past_key_value is not None else cache_argument(past_key_values, cache)
    given = attn_mask if attention_mask is None else attention_mask
    q, k, v = (
        project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if not isinstance(given, SoftmaxContext):
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        given = SoftmaxContext(given, places(position_ids, past), self.config._attn_implementation, {})
    if getattr(self.config, "attn_use_rope", True):
        q, k = turned_by_tables(q, k, self.rotary_emb, given.where)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past is not None:
        k, v = past.update(k, v, self._leet.index)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(given.implementation, eager_attention)
    dropout = self.attention_dropout if self.training else 0.0
    o, weights = attend(self, q, k, v, given.mask, dropout=dropout, scaling=self.head_dim**-0.5, **given.bounds)
    o = o.flatten(-2)
    if getattr(self, "use_output_gate", False):
        o = o * torch.sigmoid(self.o_gate(hidden_states))
    return self.o_proj(o), weights if output_attentions else None, past


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention with its weights: query [B, H, T, D], key and value [B, Hkv, S, D], an additive mask or None."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
