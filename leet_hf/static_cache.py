"""The recurrent layer of a static cache."""

from __future__ import annotations

from typing import Any

import torch

from .cache import RecurrentLayer, lasting_tensors
from .shapes import CacheSpec


class StaticRecurrentLayer(RecurrentLayer):
    """A recurrent layer of a StaticCache: addresses stay and the length is a tensor: one graph serves all lengths."""

    is_compileable = True
    is_croppable = False  # type: ignore[assignment]  # as StaticLayer

    def __init__(self, spec: CacheSpec, index: int, max_cache_len: int | None) -> None:
        """max_cache_len: of the cache's softmax layers, None if there is none."""
        super().__init__(spec, index)
        self.max_cache_len = max_cache_len
        with lasting_tensors():
            self.cumulative_length = torch.tensor(0, dtype=torch.int64)

    def get_seq_length(self) -> Any:
        """A tensor on the device; 0 before the first tokens, as StaticLayer."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length if self.max_cache_len is None else self.max_cache_len, 0

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget all tokens, in place: the batch size stays, as in StaticLayer."""
        if self.state is not None:
            self.state.reset()
        self._forget()

    def activate_past_recording(self) -> None:
        """Nothing: a static cache can not be cropped, which `is_croppable` says."""

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(
            f"cache layer {self.index} (recurrent, static) can not take tokens back: use a DynamicCache to crop"
        )

    def _moved(self) -> None:
        super()._moved()
        assert self.state is not None
        with lasting_tensors():
            self.cumulative_length = self.cumulative_length.to(self.state.base.device)
        if not torch.compiler.is_compiling():
            held = self.state
            for x in (held.base, held.keys, held.values, held.log_decays, held.cursor, self.cumulative_length):
                torch._dynamo.mark_static_address(x)

    def count_step(self, tokens: int) -> None:
        # The host's copy of the counter is for crop alone; an int that changes would compile again at every step.
        self._count(tokens)

    def _count(self, tokens: int) -> None:
        self.cumulative_length.add_(tokens)
        self.has_previous_state[0] = True

    def _set_length(self, length: int) -> None:
        self.cumulative_length.fill_(length)
