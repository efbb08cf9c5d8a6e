"""Block-sparse attention (InfLLM-v2) of MiniCPM-SALA, which stays as it is: the caches it wants, inside standard ones.

It attends to all tokens while they are few (`dense_len`), then to blocks that it chooses by compressed keys, which it
keeps in cache layers of a class of its own. Where those are gone it makes them again from the keys.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..host import Prepared
from ..versions import CACHE

ATTENTION, LAYER = "MiniCPMInfLLMv2Attention", "InfLLMv2CacheLayer"


def is_sparse(attention: Any) -> bool:
    """Whether a module is, by its class, a block-sparse attention."""
    return any(cls.__name__ == ATTENTION for cls in type(attention).__mro__)


def layer_class(attention: Any) -> type | None:
    """The class of cache layers that lies beside the attention's own class; its code is loaded already."""
    homes = (sys.modules.get(cls.__module__) for cls in type(attention).__mro__ if cls.__name__ == ATTENTION)
    return next((found for home in homes if isinstance(found := getattr(home, LAYER, None), type)), None)


def sparse_arguments(attentions: list[tuple[int, Any]], ready: Prepared, mask: Any) -> dict[str, Any]:
    """What block-sparse layers are called with: a mask of pads [B, past + T], and the cache as they know it.

    attentions: with their places. mask: the caller's, [B, past + T] or None. Puts the layers they want into the cache.
    Raises ValueError for what this attention can not do: packed sequences, a static cache, and several tokens at once
    after so many that it is sparse.
    """
    if "seq_idx" in ready.arguments:
        raise ValueError(
            "sequences are packed, which block-sparse attention does not see: give it one sequence per row"
        )
    cache, (rows, tokens) = ready.cache, ready.hidden_states.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask is not a mask of pads [batch, tokens], which block-sparse attention needs")
    past = 0 if cache is None else _made_ready(cache, attentions, tokens)
    if mask is None:
        mask = torch.ones(rows, past + tokens, dtype=torch.int64, device=ready.hidden_states.device)
    return {"attention_mask": mask, "past_key_value": None if cache is None else _AsTheirs(cache)}


def _made_ready(cache: Any, attentions: list[tuple[int, Any]], tokens: int) -> int:
    """How many tokens the cache holds."""
    for index, _ in attentions:
        if not isinstance(cache.layers[index], DynamicLayer):
            kind = type(cache.layers[index]).__name__
            raise ValueError(f"{CACHE} has a {kind} at layer {index}: block-sparse attention needs a DynamicCache")
    past, dense = int(cache.get_seq_length()), min(attention.dense_len for _, attention in attentions)
    if past and tokens > 1 and past + tokens >= dense:
        raise ValueError(
            f"{tokens} tokens were given after {past} in {CACHE}: from {dense} tokens on, the block-sparse attention "
            "of this model takes them one by one, or all from the beginning"
        )
    for index, attention in attentions:
        layer, theirs = cache.layers[index], layer_class(attention)
        assert theirs is not None
        if not isinstance(layer, theirs):
            cache.layers[index] = new = _forgetful(theirs)()
            new.__dict__.update(layer.__dict__)
    return past


class _AsTheirs:
    """A standard cache, called as the host's own, whose further methods are those of its layers."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    @property
    def layers(self) -> list[Any]:
        return self._cache.layers

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(layer_idx)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("update_"):
            raise AttributeError(name)

        def of_layer(states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._cache.layers[layer_idx], name)(states, *args, **kwargs)

        return of_layer


@functools.cache
def _forgetful(theirs: Any) -> type:
    """Their cache layer, whose compressed keys go where rows or tokens do: theirs stay what they were."""

    class SparseLayer(theirs):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._changed(lambda keys: keys.index_select(0, beam_idx.to(keys.device)))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self._changed(lambda keys: keys[indices])

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._changed(lambda keys: keys.repeat_interleave(repeats, dim=0))

        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove)
            self._changed(lambda keys: keys[:, : self.get_seq_length()])

        def reset(self) -> None:
            super().reset()
            self._changed(lambda keys: keys[:0, :0])

        def _changed(self, change: Callable[[Tensor], Tensor]) -> None:
            """change: what was done to the rows and tokens of keys [B, T, H, D]."""
            plain = getattr(self, "no_rope_keys", None)
            if isinstance(plain, Tensor) and plain.numel():
                self.no_rope_keys = change(plain)
            self.__dict__.update({name: value for name, value in theirs().__dict__.items() if "compress" in name})

    return SparseLayer
