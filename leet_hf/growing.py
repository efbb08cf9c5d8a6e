"""A softmax layer of a DynamicCache that grows in place: its tensors keep their addresses until they are full."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache import lasting_tensors
from .taken import number_taken

LEAST = 256  # slots of the smallest buffer


class GrowingLayer(DynamicLayer):
    """As DynamicLayer to everyone who asks, but keys and values are views of buffers with room for more tokens.

    buffers: (keys, values), each [B, H, capacity, D], or None without tokens; capacity is a power of two and doubles.
    """

    holds_every_token = True

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.graph: tuple[Tensor, Tensor] | None = None  # keys and values with their autograd history, while recorded
        self.length = 0
        super().__init__()

    @classmethod
    def of(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer with what another one holds."""
        new = cls()
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            new.update(layer.keys, layer.values)  # type: ignore[arg-type]
        return new

    @property
    def capacity(self) -> int:
        return 0 if self.buffers is None else self.buffers[0].shape[2]

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[B, H, length, D]: a view, or None without tokens."""
        return next(iter(self._held()), None)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assigned("keys", value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """As `keys`."""
        return next(iter(self._held()[1:]), None)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assigned("values", value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append key_states and value_states [B, H, T, D] and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        new = (key_states, value_states)
        past = self.graph or self._held()
        self.reserve(self.length + tokens, *new)
        assert self.buffers is not None
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, self.length : self.length + tokens] = x.detach()
        self.length += tokens
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*new, *past))
        self.graph = None
        if recorded:
            self.graph = (torch.cat([*past[:1], key_states], 2), torch.cat([*past[1:], value_states], 2))
        return self.graph or self._held()  # type: ignore[return-value]

    def reserve(self, length: int, *like: Tensor) -> None:
        """Make room for `length` tokens. like: keys and values [B, H, any, D], where there are no buffers yet."""
        if length <= self.capacity:
            return
        capacity = max(LEAST, 1 << (length - 1).bit_length())
        sources = like or self.buffers
        assert sources is not None
        with lasting_tensors():
            # zeros: slots that a mask hides are still multiplied, and NaN times nothing is NaN
            new = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in sources)
        self._move_to(new)  # type: ignore[arg-type]

    def share(self, buffers: tuple[Tensor, Tensor]) -> None:
        """Go on in buffers that someone else owns too, with room for all tokens; copies the tokens there."""
        if self.buffers is None or self.buffers[0] is not buffers[0]:
            self._move_to(buffers)

    def part(self) -> None:
        """Go on in buffers of its own: what was shared stays as it is."""
        if self.buffers is not None:
            with lasting_tensors():
                self.buffers = (self.buffers[0].clone(), self.buffers[1].clone())

    def advance(self, tokens: int) -> None:
        """Note tokens that were written to the buffers from outside."""
        self.length += tokens
        self.graph = None

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.buffers, self.graph, self.length, self.is_initialized = None, None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens: nothing is copied."""
        self.length = max(0, self.length - number_taken(tokens_to_remove))
        self.graph = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, so that the addresses stay."""
        for held in self._held():
            held.copy_(held.index_select(0, beam_idx.to(held.device)))
        self.graph = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.buffers is not None:
            with lasting_tensors():
                self.buffers = tuple(x.repeat_interleave(repeats, dim=0) for x in self.buffers)  # type: ignore
            self.graph = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.buffers is not None:
            with lasting_tensors():
                self.buffers = tuple(x[indices, ...] for x in self.buffers)  # type: ignore
            self.graph = None

    def offload(self) -> None:
        """Nothing: a layer that shares its buffers stays where they are."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def _held(self) -> tuple[Tensor, ...]:
        return () if self.buffers is None else tuple(x[:, :, : self.length] for x in self.buffers)

    def _move_to(self, buffers: tuple[Tensor, Tensor]) -> None:
        if self.buffers is not None:
            for old, new in zip(self.buffers, buffers, strict=True):
                new[:, :, : self.length].copy_(old[:, :, : self.length])
        self.buffers = buffers

    def _assigned(self, name: str, value: Tensor | None) -> None:
        if value is not None:
            raise RuntimeError(f"{name} of a GrowingLayer were assigned: use update, crop or the batch methods")
