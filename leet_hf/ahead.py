"""Steps that are launched before generate() asks for them, so that the device has work while the host decides.

After every token the loop of `generate()` waits for the device to say whether all rows have ended, then prepares the
next forward: tenths of a millisecond in which the device would do nothing. The step of the token just chosen is
therefore launched beside the loop's stream before that question; the forward that follows finds it under way. If the
loop ends instead, the step is one token that every layer takes back, as after a crop. Nothing else is done ahead:
logits processors, sampling and criteria see what they always see.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from .upgrade import recurrent_layers

if TYPE_CHECKING:
    from .decoding import Decoding
    from .recording import Running
    from .step import Step

PASS = "leet_decoding"  # the keyword by which generate() of an admitted call reaches the base model's forward

# What decides which forward follows a token: where a model has its own, it may be another.
_DECIDING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
_ours: set[Callable[..., Any]] = set()
_LOOPS = {
    GenerationMode.GREEDY_SEARCH: "_sample",
    GenerationMode.SAMPLE: "_sample",
    GenerationMode.ASSISTED_GENERATION: "_assisted_decoding",
}
_LOOP = GenerationMixin._sample.__code__


@dataclass
class Ahead:
    """A forward of tokens after the first `length` ones of a cache that was run, or launched, before it is asked for.

    output: its last hidden states [B, T, hidden]; step: the recorded step that gave them, the last one of several.
    noted: how many tokens the cache's layers are to take back, unless it is asked for: these, and any behind them.
    running: where it may be under way still.
    """

    step: Step
    cache: Any
    length: int
    output: Tensor
    noted: int
    running: Running | None = None

    @property
    def tokens(self) -> int:
        return self.output.shape[1]

    @classmethod
    def launch(cls, step: Step, cache: Any, ids: Tensor) -> Ahead | None:
        """Launch the step for tokens ids [B, 1]; None, with nothing done, where it is none to be taken back."""
        length = int(cache.get_seq_length())
        if step.recorded is None or ids.shape != step.ids.shape or (step.window and length >= step.window):
            return None
        layers = recurrent_layers(cache)
        for layer in layers:
            if layer.record_past or layer.taken:
                return None
        step.fill_next(ids, length)
        running = step.recorded.launch()
        for layer in layers:
            layer.step_ahead(running)
        return cls(step, cache, length, running.output, 1, running)

    def is_asked_for(self, cache: Any, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether this is the forward of tokens ids [B, T] after a cache; then they are no longer to be taken back.

        The cache must have the tensors of the step.
        """
        rows, tokens = self.output.shape[:2]
        if cache is not self.cache or ids.shape != (rows, tokens) or int(cache.get_seq_length()) != self.length:
            return False
        if self.step.padded if mask is None else mask.shape != (rows, self.length + tokens):
            return False
        layers = recurrent_layers(cache)
        if any(layer.taken != self.noted for layer in layers):
            return False  # someone has looked at the state, or taken back more
        for layer in layers:
            layer.taken, layer.running = self.noted - tokens, None
        return True

    def take_back(self) -> None:
        """Take its tokens back from a cache that goes on without them."""
        if self.step.arena.has(self.cache):
            self.step.arena.settle(self.cache)


class Pass:
    """One generate() call's right to recorded steps. It lives as long as the call, which is how its end is known.

    masked: how many tokens its attention mask said something about; those that follow are no pads. most: how many
    tokens its cache may come to hold by steps that are launched ahead; 0: none is. bounds: (most tokens of the text,
    tokens that end it), if nothing else ends a text of assisted decoding. last: the recorded step that the last forward
    was, with its cache, if it was one; hidden_states: what that forward returned, [B, T, hidden]. ahead: what was run
    before transformers' loop asks for it.
    """

    def __init__(self, decoding: Decoding, masked: int) -> None:
        self.decoding, self.masked, self.most = decoding, masked, 0
        self.bounds: tuple[int, frozenset[int]] | None = None
        self.last: tuple[Step, Any] | None = None
        self.hidden_states: Tensor | None = None
        self.ahead: Ahead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Pass:
        return self

    def __del__(self) -> None:
        if (ahead := self.arrived()) is not None:
            with self.decoding.lock:
                ahead.take_back()

    def go_ahead(self, ids: Tensor) -> None:
        """Launch the step for the last of the tokens ids [B, T], which generate() has just chosen."""
        last, self.last = self.last, None
        if last is None or int(last[1].get_seq_length()) >= self.most:
            return
        with self.decoding.lock:
            if self.decoding.holds(self, *last):
                self.ahead = Ahead.launch(*last, ids[:, -1:])

    def arrived(self) -> Ahead | None:
        """What was run ahead, if anything was: what the current stream does next comes after it."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.running is not None:
            ahead.running.wait()
        return ahead


class _Admitted(threading.local):
    """The pass that this thread's last generate() call got, and the config of that call."""

    granted: weakref.ref[Pass] | None = None
    config: weakref.ref[Any] | None = None


_admitted = _Admitted()


def decides_as_transformers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that a method in place of one of transformers' leads to the same forwards after the first."""
    _ours.add(function)
    return function


def is_ours(model: Any, name: str) -> bool:
    """Whether a method of a model is one that was declared so."""
    return function_of(model, name) in _ours


def function_of(model: Any, name: str) -> Any:
    """The function behind a method of a model, its own or its class's; None if it has none."""
    method = model.__dict__.get(name, getattr(type(model), name, None))
    return getattr(method, "func", method)


def let_go_ahead(granted: Pass, model: Any, config: Any, mode: GenerationMode, most: int) -> None:
    """Let a generate() call run what its loop will ask for next, if that loop is one whose next forward is known.

    most: tokens that its cache will hold in the end, if no row ends before.
    """
    loop = _LOOPS.get(mode)
    if loop is None or config.is_assistant:
        return
    for name in (loop, *_DECIDING):
        if function_of(model, name) is not getattr(GenerationMixin, name) and not is_ours(model, name):
            return
    granted.most = 0 if mode == GenerationMode.ASSISTED_GENERATION else most
    _admitted.granted, _admitted.config = weakref.ref(granted), weakref.ref(config)


def going_ahead(criteria: StoppingCriteriaList, config: Any) -> StoppingCriteriaList:
    """The criteria of the generate() call with this config; they launch the next step if the call may do that."""
    granted = None if _admitted.granted is None else _admitted.granted()
    if granted is None or _admitted.config is None or _admitted.config() is not config:
        return criteria
    if granted.most == 0:
        granted.bounds = _bounds(criteria)
        return criteria
    return _Criteria(criteria, granted)


def _bounds(criteria: StoppingCriteriaList) -> tuple[int, frozenset[int]] | None:
    """(most tokens of a text, tokens that end it); None where something else may end it, or nothing does."""
    longest: list[int] = []
    ends: set[int] = set()
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            longest.append(int(each.max_length))
        elif type(each) is EosTokenCriteria:
            ends.update(each.eos_token_id.flatten().tolist())
        else:
            return None
    return (min(longest), frozenset(ends)) if longest else None


class _Criteria(StoppingCriteriaList):
    """Transformers' criteria, after which the next step is launched, if it is transformers' own loop that asks."""

    def __init__(self, criteria: StoppingCriteriaList, granted: Pass) -> None:
        super().__init__(criteria)
        self._granted = granted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if sys._getframe(1).f_code is _LOOP:
            self._granted.go_ahead(input_ids)
        return done
