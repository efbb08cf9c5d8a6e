"""The recurrent layer: what a linear-attention layer keeps, inside transformers' own DynamicCache and StaticCache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from leet_linear_attention import DecodeState

from .shapes import CacheSpec, RecurrentShape
from .taken import TakesBack, number_taken

BUFFER = 16  # tokens between two updates of the base state in plain decoding
WINDOW = 64  # tokens that can be taken back after a recorded forward, at least
SLACK = 16  # tokens from before the last crop to keep: drafts are taken back by a little more than they wrote
WIDEST = 128  # tokens that a recording cache comes to hold by itself, however many go without a crop


class RecurrentLayer(TakesBack, LinearAttentionLayer, CacheLayerMixin):
    """One layer's recurrent state and length. Lives in `cache.layers` where a LinearAttentionLayer would.

    It wraps one DecodeState, made when the first tokens come. It knows its own length, so that a cache works whose
    first layer, or every layer, is recurrent. Tokens are taken back (`crop`) while the DecodeState's buffer holds them;
    after `activate_past_recording`, that is at least `window` tokens, and with `grows` all since the last crop.
    """

    is_compileable = False
    is_croppable = True  # type: ignore[assignment]  # a property in the base class
    supports_early_init = True
    is_sliding = False

    def __init__(self, spec: CacheSpec, index: int) -> None:
        """spec: of the model the cache is for. index: of the layer in it."""
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        shape = spec[index]
        assert isinstance(shape, RecurrentShape)
        self.spec, self.index, self.shape = spec, index, shape
        self.graph: Tensor | None = None  # the state with its autograd history, while gradients are recorded
        self.window, self.grows = WINDOW, False
        self.cumulative_length: Any = 0
        self._since_crop: int | None = None  # None: no forward since recording began

    # What attend asks.

    @property
    def has_tokens(self) -> bool:
        """Whether any token was seen since creation or reset. A host flag, also where the length is on the device."""
        return self.has_previous_state[0]

    def ready(self, batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> DecodeState:
        """The state, with room for `tokens` more tokens; allocated for `batch` rows if it is not yet."""
        if self.state is None:
            self._open(batch, dtype, device)
        self.expect(tokens)
        assert self.state is not None
        return self.state

    def expect(self, tokens: int) -> bool:
        """See that `tokens` more can be taken back, where they may be; whether the state had to move for that."""
        if not self.record_past:
            return False
        # The first forward may hold a whole prompt: of that one, `window` tokens are enough.
        self._since_crop = 0 if self._since_crop is None else self._since_crop + tokens
        return self.grows and self._keep_at_least(min(self._since_crop + SLACK, WIDEST))

    def stepped(self, tokens: int) -> int:
        """How many of the next tokens, the last ones, go through the buffer: all if they fit; else those to be kept."""
        buffer, keep = self._sizes() if self.state is None else (self.state.buffer, self.state.keep)
        if tokens <= buffer:
            return tokens
        return keep if self.record_past else 0

    def load(self, state: Tensor, tokens: int) -> None:
        """Become `state` [B, H, K, V], which `tokens` more tokens have led to."""
        assert self.state is not None
        with torch.no_grad():
            self.state.load(state)
        self.graph = state if state.requires_grad else None
        self._held = 0
        self._count(tokens)

    def restore(
        self, base: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor, length: int, *, buffer: int, keep: int
    ) -> None:
        """Become what another layer was after `length` tokens: its base state [B, H, K, V] and the tokens it held.

        keys [B, n, Hk, K], values [B, n, Hv, V], log_decays [B, n, H]: the last n <= buffer tokens.
        """
        self.state = self._allocate(base.shape[0], keys.dtype, base.device, buffer, keep)
        self.dtype, self.device = keys.dtype, base.device  # type: ignore[assignment]
        self.is_initialized = self.is_recurrent_states_initialized[0] = True
        self.state.load(base)
        if keys.shape[1]:
            self.state.append(keys, values, log_decays)
        self._moved()
        self._held = keys.shape[1]
        self._set_length(length)
        self.has_previous_state[0] = True

    def part(self) -> None:
        """Go on with a state of its own: one that was shared stays as it is."""
        if self.state is not None:
            self.state = self.state.clone()

    def count_step(self, tokens: int) -> None:
        """Note a step of the state by `tokens` tokens."""
        self.graph = None
        self._held = self._held_beside(tokens) + tokens
        self._count(tokens)

    def differentiable_state(self) -> Tensor | None:
        """The state to go on from while gradients are recorded: a tensor of its own, or None without tokens."""
        if self.graph is not None or not self.has_tokens:
            return self.graph
        return self.current_state()

    def current_state(self) -> Tensor | None:
        """A copy of the state of every token so far, float32 [B, H, K, V]. Leaves the buffer as it is."""
        return None if self.state is None else self.state.clone().fold()

    # What transformers asks.

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:  # type: ignore[override]
        """Transformers' view of the state: {0: a copy of it, or None}."""
        return {0: self.current_state() if self.has_tokens else None}

    @recurrent_states.setter
    def recurrent_states(self, states: dict[int, Tensor | None]) -> None:
        if any(state is not None for state in states.values()):
            self._not_ours("recurrent_states was assigned")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of keys as a softmax layer of the same cache has them."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        """Allocate for the batch, dtype and device of key_states, as `Cache.early_initialization` asks."""
        if self.state is None:
            self._open(key_states.shape[0], key_states.dtype, key_states.device)

    def reset(self) -> None:
        """Forget everything, the batch size included, as a softmax layer of a DynamicCache does."""
        self.state = None
        self.is_initialized = self.is_recurrent_states_initialized[0] = False
        self.__dict__.pop("batch_size", None)
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state.reorder(beam_idx)
            self.graph = None

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            indices = torch.as_tensor(indices, device=self.state.base.device)
            # Fancy indexing, which softmax layers use, also takes a mask of rows.
            indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            with lasting_tensors():
                self.state.select(indices)
            self._moved()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            with lasting_tensors():
                self.state.repeat(repeats)
            self._moved()

    def activate_past_recording(self) -> None:
        self.record_past, self._since_crop = True, None
        if self.state is not None:
            self._keep_at_least(self.window)

    def record(self, window: int, grows: bool) -> None:
        """While recording: keep at least `window` tokens that can be taken back; grows: and all since the last crop."""
        self.window, self.grows = max(window, WINDOW), grows
        if self.record_past and self.state is not None:
            self._keep_at_least(self.window)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. Raises RuntimeError if the buffer does not hold them."""
        remove = number_taken(tokens_to_remove)
        self._since_crop = 0
        if self._state is None or remove == 0:
            return
        if remove >= self.cumulative_length:
            self.reset()
            return
        if remove > self._held:
            raise RuntimeError(
                f"cache layer {self.index} (recurrent) was asked to take back {remove} tokens but holds the last "
                f"{self._held}: call cache.activate_past_recording() before the forward that may be taken back"
                + (f", and take back at most {self._state.keep} tokens at a time" if self.record_past else "")
            )
        self.take_back(remove)
        self.graph, self._held = None, self._held - remove
        self._set_length(self.cumulative_length - remove)

    def offload(self) -> None:
        """Nothing: the state is small and stays on its device."""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._not_ours("keys and values were given")

    def update_conv_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._not_ours("a convolution state was given")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._not_ours("a state was given")

    # Inside.

    def _forget(self) -> None:
        self.graph, self._held, self._since_crop = None, 0, None
        self._set_length(0)
        self.has_previous_state[0] = False

    def _not_ours(self, what: str) -> NoReturn:
        raise ValueError(
            f"{what} to cache layer {self.index}, the recurrent layer of a patched model: give every other model "
            "a cache of its own"
        )

    def _sizes(self) -> tuple[int, int]:
        """(buffer, keep) of the state to allocate."""
        if not self.record_past:
            return BUFFER, 0
        size = _power_of_two(self.window)
        return size, size

    def _open(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.state = self._allocate(batch, dtype, device, *self._sizes())
        self.dtype, self.device = dtype, device  # type: ignore[assignment]
        self.is_initialized = self.is_recurrent_states_initialized[0] = True
        self._moved()

    def _allocate(self, batch: int, dtype: torch.dtype, device: torch.device, buffer: int, keep: int) -> DecodeState:
        heads, key_heads, value_heads, key_dim, value_dim = self.shape
        with lasting_tensors():
            return DecodeState.allocate(
                batch, heads, key_dim, value_dim, buffer, dtype, device,
                key_heads=key_heads, value_heads=value_heads, keep=keep,
            )  # fmt: skip

    def _keep_at_least(self, tokens: int) -> bool:
        """Whether the state, to keep more tokens, was moved into another, with those in its buffer."""
        assert self._state is not None
        if tokens <= self._state.keep:
            return False
        size, old = _power_of_two(tokens), self.state
        assert old is not None
        new = self._allocate(old.base.shape[0], old.keys.dtype, old.base.device, max(size, self._held), size)
        new.load(old.base)
        if self._held:
            slots = (old.cursor[0] + torch.arange(self._held, device=old.base.device)) % old.keys.shape[1]
            new.append(*(x.index_select(1, slots) for x in (old.keys, old.values, old.log_decays)))
        self.state = new
        self._moved()
        return True

    def _moved(self) -> None:
        """After the state's tensors were made anew."""
        assert self.state is not None
        self.batch_size, self.graph, self.lent = self.state.base.shape[0], None, False

    def _count(self, tokens: int) -> None:
        self._set_length(self.cumulative_length + tokens)
        self.has_previous_state[0] = True

    def _set_length(self, length: int) -> None:
        self.cumulative_length = length


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def lasting_tensors() -> AbstractContextManager[object]:
    """Tensors made in inference mode could not be written to outside it: make ordinary ones."""
    if torch.is_inference_mode_enabled() and not torch.compiler.is_compiling():
        return torch.inference_mode(False)
    return nullcontext()
