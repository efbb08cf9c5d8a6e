"""Taking tokens back: how many a crop is asked for, and a state that is moved back when it is next wanted."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leet_linear_attention import DecodeState

if TYPE_CHECKING:
    from .recording import Running

_last: tuple[weakref.ref[Tensor], int, int] | None = None  # a tensor on a device, its version, what it held


class TakesBack:
    """Something with a decode state, the last tokens of which can be taken back.

    lent: whether the state is an arena's, which takes tokens back from all layers at once: `taken` notes how many.
    running: a step of the state that may be under way on another stream; one of `taken` is its token.
    _held: tokens in the state's buffer but `taken`, the host's copy of the device's counter.
    """

    _state: DecodeState | None = None
    lent = False
    taken = 0
    running: Running | None = None
    _held = 0

    @property
    def state(self) -> DecodeState | None:
        """The state of all tokens so far, or None before there is one."""
        self.settle()
        return self._state

    @state.setter
    def state(self, state: DecodeState | None) -> None:
        self._state, self.lent, self.taken = state, False, 0

    def take_back(self, tokens: int) -> None:
        """Take back the last tokens, of which the state holds that many."""
        self.taken += tokens
        if not self.lent:
            self.settle()

    def step_ahead(self, running: Running) -> None:
        """Note a step by one token that was launched, and is taken back unless someone takes it off `taken`."""
        self._held = self._held_beside(1)  # what it folds stays folded
        self.taken, self.running = self.taken + 1, running

    def _held_beside(self, tokens: int) -> int:
        """How many of the tokens in the buffer are still there after a step by `tokens` more."""
        state, held = self._state, self._held
        assert state is not None
        # As DecodeState folds: nothing while all fit, else all but those to be kept.
        return held if held + tokens <= state.buffer else held - min(held, held + tokens - max(state.keep, tokens))

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles get: a step that is under way can not be copied, so its token is taken back."""
        if self.running is not None:
            self.settle()
            self.arrive()
        return dict(self.__dict__)

    def settle(self) -> None:
        """Take back from the state what was noted."""
        if self.taken:
            assert self._state is not None
            self.arrive()
            self._state.rewind(self.taken)
            self.taken = 0

    def arrive(self) -> None:
        """Let what the current stream does next come after a step that may be under way."""
        if self.running is not None:
            self.running.wait()
            self.running = None


def number_taken(tokens_to_remove: int | Tensor) -> int:
    """The n >= 0 of `crop(-n)`: assisted decoding may give one tensor to every layer, which waits for its device once.

    Raises ValueError for a positive tokens_to_remove.
    """
    global _last
    removed = tokens_to_remove
    if isinstance(removed, Tensor):
        # Tensors of a CPU cost nothing to read and can be written by others; those of inference mode have no version.
        if removed.is_cpu or removed.is_inference():
            removed = int(removed)
        else:
            last = _last
            if last is None or last[0]() is not removed or last[1] != removed._version:
                last = _last = weakref.ref(removed), removed._version, int(removed)
            removed = last[2]
    if removed > 0:
        raise ValueError(
            f"crop was asked for {int(removed)}, must be 0 or negative: minus the number of tokens to take back"
        )
    return -int(removed)
