"""The tensors that recorded decode steps read and write, lent to one cache at a time."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from leet_linear_attention import DecodeState

from .cache import RecurrentLayer, lasting_tensors
from .growing import GrowingLayer
from .shapes import CacheSpec, RecurrentShape
from .upgrade import recurrent_layers

TENSORS = ("base", "keys", "values", "log_decays", "cursor")  # of a DecodeState


class Arena:
    """States and key-value buffers of one batch at fixed addresses, and the recordings that use them.

    A cache is bound by sharing its tensors with the arena: everything that changes them in place (a replay, a crop, the
    reordering of beams) is seen by both. When another cache is bound while the first one lives, the first gets copies.
    Changes that make new tensors (another batch, a wider window) part the cache from the arena, which `bind` notices.

    most: tokens that one step may bring. capacity: slots of the softmax layers, 0 where there are none. counts: int32
    [recurrent layers], how many tokens each state has buffered: a view of all their cursors.
    """

    def __init__(self, cache: Any, spec: CacheSpec) -> None:
        """Around the tensors of a cache whose layers all hold tokens."""
        self.key = key_of(cache)
        self.recordings: dict[Any, Any] = {}
        self.layers: list[Any] = []
        for index, (layer, shape) in enumerate(zip(cache.layers, spec, strict=True)):
            recurrent = isinstance(shape, RecurrentShape)
            self.layers.append(StepRecurrent(layer, spec, index) if recurrent else StepSoftmax(layer))
        self.cache = Cache(layers=self.layers)
        states = [layer.state for layer in self.layers if isinstance(layer, StepRecurrent)]
        self.device = states[0].base.device
        self.counts = _joined_cursors(states)
        for own, layer in zip(self.layers, cache.layers, strict=True):
            if isinstance(own, StepRecurrent):
                own.lend_to(layer)  # with the new cursor
        self.most = min(state.buffer for state in states)  # tokens of one step
        self.capacity = next((layer.buffers[0].shape[2] for layer in self.layers if isinstance(layer, StepSoftmax)), 0)
        with lasting_tensors():
            self.length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.padding = torch.zeros(self.rows, self.capacity, dtype=torch.bool, device=self.device)
        self._holder: weakref.ref[Any] | None = None
        self._stream: Any = None

    @property
    def rows(self) -> int:
        return self.key[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def holder(self) -> Any:
        """The cache that has these tensors now, or None."""
        return None if self._holder is None else self._holder()

    def has(self, cache: Any) -> bool:
        """Whether a cache has these tensors, all of them."""
        if self.holder() is not cache or len(cache.layers) != len(self.layers):
            return False
        for own, layer in zip(self.layers, cache.layers, strict=True):  # noqa: SIM110  # once a token: no generator
            if not own.shares(layer):
                return False
        return True

    def forget_with_holder(self, forget: Callable[[], None]) -> None:
        """Have `forget` called when the cache that has these tensors is gone."""
        if (holder := self.holder()) is not None:
            weakref.finalize(holder, forget).atexit = False

    def bind(self, cache: Any) -> None:
        """Lend the tensors to a cache with the same `key_of` and no more capacity; its content moves in."""
        if self.has(cache):
            return
        holder = self.holder()
        self._wait_for_last_stream()
        if holder is not None and holder is not cache:
            for own, layer in zip(self.layers, holder.layers, strict=False):
                if own.shares(layer):
                    layer.part()
        for own, layer in zip(self.layers, cache.layers, strict=True):
            if not own.shares(layer):
                own.take(layer)
        self._holder = weakref.ref(cache)

    def settle(self, cache: Any) -> None:
        """Take back what the cache that is bound has noted since the last step: of all layers in one launch."""
        layers = recurrent_layers(cache)
        taken = {layer.taken for layer in layers}
        if len(taken) > 1:
            for layer in layers:
                layer.settle()
        elif (number := taken.pop()) > 0:
            for layer in layers:
                layer.taken = 0
                layer.arrive()
            self.counts.sub_(number)

    def snapshot(self) -> Callable[[], None] | None:
        """What puts the states back as they are now; None where there is no memory for a copy."""
        own = [layer.state for layer in self.layers if isinstance(layer, StepRecurrent)]
        try:
            kept = [(state, state.clone()) for state in own]
        except torch.OutOfMemoryError:
            return None

        def restore() -> None:
            for state, copied in kept:
                for name in TENSORS:
                    getattr(state, name).copy_(getattr(copied, name))

        return restore

    def _wait_for_last_stream(self) -> None:
        """Work of the last holder may still be queued on another stream."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream


def key_of(cache: Any) -> tuple[Any, ...]:
    """What a cache and an arena must have in common: rows, and what the states' tensors look like."""
    states: list[Any] = [layer.state for layer in recurrent_layers(cache)]
    first = states[0]
    sizes = {(state.buffer, state.keep, state.base.shape, state.keys.shape, state.values.shape) for state in states}
    return (first.base.shape[0], first.keys.dtype, first.base.device, frozenset(sizes))


class StepRecurrent(RecurrentLayer):
    """A recurrent layer as a recorded step sees it: a state to advance. Nothing is counted on the host."""

    def __init__(self, layer: RecurrentLayer, spec: CacheSpec, index: int) -> None:
        super().__init__(spec, index)
        assert layer.state is not None
        # No two arenas have the same tensors: a layer that has another one's is copied.
        self._state: DecodeState = layer.state.clone() if layer.lent else _sharing(layer.state)
        self.batch_size = self.state.base.shape[0]
        self.is_initialized = self.has_previous_state[0] = True

    @property  # type: ignore[misc]  # it is never another's
    def state(self) -> DecodeState:
        return self._state

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def shares(self, layer: Any) -> bool:
        state = layer._state  # noted tokens stay noted
        return state is not None and state.base is self._state.base

    def take(self, layer: RecurrentLayer) -> None:
        """Copy the layer's state here, and let the layer go on here."""
        own, theirs = self.state, layer.state
        assert theirs is not None
        with torch.no_grad():
            for name in TENSORS:
                getattr(own, name).copy_(getattr(theirs, name))
        self.lend_to(layer)

    def lend_to(self, layer: RecurrentLayer) -> None:
        """Let a layer have the tensors of this one as its state."""
        layer.state, layer.lent = _sharing(self.state), True

    def ready(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        return self.state

    def stepped(self, tokens: int) -> int:
        return tokens

    def count_step(self, tokens: int) -> None:
        """Nothing: the cache that is bound counts after each replay."""


class StepSoftmax(DynamicLayer):
    """A softmax layer as a recorded step sees it: buffers, and the slots that the tokens go to.

    slots: int64 [T] on the device; window: how many slots attention looks at. Both are set before a step is recorded.
    """

    holds_every_token = True

    def __init__(self, layer: GrowingLayer) -> None:
        super().__init__()
        assert layer.buffers is not None
        self.buffers = layer.buffers
        self.slots: Tensor | None = None
        self.window = 0
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.buffers)

    def shares(self, layer: Any) -> bool:
        return layer.buffers is not None and layer.buffers[0] is self.buffers[0]

    def take(self, layer: GrowingLayer) -> None:
        """Copy the layer's tokens here, and let the layer go on here."""
        layer.share(self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.slots is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.slots, new)
        return self.buffers[0][:, :, : self.window], self.buffers[1][:, :, : self.window]


@torch.inference_mode(False)
def _joined_cursors(states: Sequence[DecodeState]) -> Tensor:
    """Make the cursors of states views of one tensor; the counts in it, int32 [states]."""
    # 16 bytes a row: kernels are compiled for cursors that begin at a multiple of that
    rows = torch.zeros(len(states), 4, dtype=torch.int32, device=states[0].cursor.device)
    for row, state in zip(rows, states, strict=True):
        row[:3].copy_(state.cursor)
        state.cursor = row[:3]
    return rows[:, 1]


def _sharing(state: DecodeState) -> DecodeState:
    """Another DecodeState of the same tensors: one that changes its batch leaves the other as it is."""
    return dataclasses.replace(state)
