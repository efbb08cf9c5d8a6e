"""Decode graphs: the forwards of a generate() call as recorded steps, where a model and a call allow it.

generate() calls the model once per token; on a GPU the host's part of that, hundreds of launches, takes many times
longer than reading weights and states. A step is therefore recorded (as a CUDA graph) and replayed. Everything a step
reads or writes has a fixed address: its inputs, and the states and keys of the cache, which an arena lends.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .ahead import PASS, Pass
from .arena import Arena, key_of
from .cache import RecurrentLayer
from .growing import LEAST, GrowingLayer
from .obstacles import MOST_TOKENS, cache_obstacle, fits, obstacle, serves, state_of
from .recording import Recorder, recorder_for
from .step import Step
from .versions import cache_argument

MOST_BYTES = 200 << 20  # of all recordings of a model
KEPT_SHARE = 1 / 8  # of the device's memory, for states and keys kept between calls


def through_graphs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a base model's forward be replaced by recorded steps within the generate() calls that were admitted."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        granted = kwargs.pop(PASS, None)
        if granted is None or args or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        return granted.decoding.run(self, forward, kwargs, granted)

    return wrapped


class Decoding:
    """The recorded steps of one generating model, kept from call to call, per batch size.

    enabled: False, or the environment's LEET_DECODE_GRAPHS=0, turns them off. recorder_for: what records for a device.
    """

    recorder_for: Callable[[torch.device], Recorder | str] = staticmethod(recorder_for)

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.refused: str | None = None  # why the last call that had none had no recorded steps
        self.lock = threading.RLock()
        self._granted: weakref.ref[Pass] | None = None
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoding:
        return self._fresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.enabled,)

    def _fresh(self) -> Decoding:
        new = type(self)(self.enabled)
        if "recorder_for" in self.__dict__:
            new.recorder_for = self.recorder_for
        return new

    def forget(self) -> None:
        """Drop all recordings and the tensors they use; caches that have these go on with them."""
        with self.lock:
            self.arenas: dict[Any, Arena] = {}
            self.recorder: Recorder | None = None
            self.full = False
            self._current: Arena | None = None
            self._model_state: Any = None

    # Admission: once per generate() call.

    def refusal(self, model: Any, base: Any) -> str | None:
        """Why calls of this model as it is now get no recorded steps, or None."""
        if not self.enabled:
            return "turned off by decode_graphs=False"
        if os.environ.get("LEET_DECODE_GRAPHS") == "0":
            return "turned off by LEET_DECODE_GRAPHS=0"
        reason = obstacle(model, base)
        if reason is None and self.recorder is None:
            recorder = self.recorder_for(next(base.parameters()).device)
            if isinstance(recorder, str):
                return recorder
            self.recorder = recorder
        return reason

    def admit(self, model: Any, base: Any, cache: Any, mask: Any = None) -> Pass | None:
        """A pass for a generate() call with this cache, which is made ready for it; None where it has to do without.

        mask: the call's attention mask [B, T], or None.
        """
        reason = self.refusal(model, base)
        if reason is None:
            reason = cache_obstacle(cache, base._leet.spec)
        self.refused = reason
        if reason is not None:
            return None
        state = state_of(base)
        with self.lock:
            if state != self._model_state:
                recorder = self.recorder if not self.arenas else None
                self.forget()
                self._model_state, self.recorder = state, recorder
                if self.recorder is None and (reason := self.refusal(model, base)) is not None:
                    self.refused = reason
                    return None
        cache.layers = [GrowingLayer.of(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return Pass(self, 0 if mask is None else mask.shape[1])

    def describe(self, model: Any, base: Any) -> str:
        """One line for people."""
        reason = self.refusal(model, base)
        if reason is not None:
            return f"decode graphs: not used: {reason}"
        steps = [step for arena in self.arenas.values() for step in arena.recordings.values()]
        recorded = sum(step.recorded is not None for step in steps)
        size = 0 if self.recorder is None else self.recorder.nbytes
        last = "" if self.refused is None else f"; not used in the last call: {self.refused}"
        return f"decode graphs: on, {recorded} recorded, {size / 2**20:.0f} MB{last}"

    # Running: once per forward of an admitted call.

    def run(self, base: Any, forward: Callable[..., Any], arguments: dict[str, Any], granted: Pass) -> Any:
        """What `forward(base, **arguments)` returns, by a recorded step where these arguments allow it."""
        cache = cache_argument(arguments.get("past_key_values"), arguments.get("cache"))
        ahead, granted.last = granted.arrived(), None
        most = MOST_TOKENS if ahead is None else max(MOST_TOKENS, ahead.tokens)
        if not serves(base, cache, arguments, most):
            return forward(base, **arguments)
        # Everything below runs between two replays: what is asked of every layer every time is kept to a minimum.
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        rows, tokens = ids.shape
        with self.lock:
            if ahead is not None and self.holds(granted, ahead.step, cache) and ahead.is_asked_for(cache, ids, mask):
                return self._counted(ahead.step, cache, ahead.output, granted)
            if tokens > MOST_TOKENS:
                return forward(base, **arguments)
            arena = self._current
            bound = arena is not None and arena.has(cache) and tokens <= arena.most
            if not bound and not fits(cache, ids):
                return forward(base, **arguments)
            length = int(cache.get_seq_length())
            if mask is not None and (mask.shape != (rows, length + tokens) or length < granted.masked):
                return forward(base, **arguments)
            if self._busy(granted):
                return forward(base, **arguments)
            for layer in cache.layers:
                if isinstance(layer, RecurrentLayer) and layer.expect(tokens):
                    bound = False
            if not bound or (arena.capacity and arena.capacity < length + tokens):  # type: ignore[union-attr]
                arena = self._arena_for(cache, base._leet.spec, length + tokens)
            assert arena is not None
            self._current, self._granted = arena, weakref.ref(granted)
            arena.settle(cache)
            step = self._step(arena, base, forward, arguments, length)
            step.fill(ids, arguments["position_ids"], mask, length)
            hidden = self._advance(step, base)
            if hidden is None:
                return forward(base, **arguments)
            return self._counted(step, cache, hidden, granted)

    def _counted(self, step: Step, cache: Any, hidden: torch.Tensor, granted: Pass) -> Any:
        """The output of a step that has run, which the layers of the cache count."""
        granted.hidden_states = hidden.clone()
        output = step.output(granted.hidden_states, cache)
        for layer in cache.layers:
            (layer.count_step if isinstance(layer, RecurrentLayer) else layer.advance)(hidden.shape[1])
        granted.last = step, cache
        return output

    def holds(self, granted: Pass, step: Step, cache: Any) -> bool:
        """Whether a call still has the tensors of a step that it ran with this cache."""
        arena = self._current
        own = self._granted is not None and self._granted() is granted
        return own and arena is step.arena and arena is not None and arena.has(cache)

    def _busy(self, granted: Pass) -> bool:
        """Whether another call, not over yet, is using recorded steps: the two would take the tensors in turns."""
        other = None if self._granted is None else self._granted()
        return other is not None and other is not granted

    def _arena_for(self, cache: Any, spec: Any, needed: int) -> Arena:
        """The arena that the cache is bound to, with room for `needed` tokens."""
        arena = self._current
        if arena is None or not arena.has(cache) or (arena.capacity and arena.capacity < needed):
            arena = self.arenas.pop(key_of(cache), None)
            if arena is None or (arena.capacity and arena.capacity < needed):
                for layer in cache.layers:
                    if isinstance(layer, GrowingLayer):
                        layer.reserve(needed)
                arena = Arena(cache, spec)
            arena.bind(cache)
            self.arenas[arena.key] = arena  # the last one used is the last one
            self._trim(arena)
        return arena

    def _trim(self, used: Arena) -> None:
        """Keep what fits the share of memory for states between calls, the arenas used last."""
        if used.device.type != "cuda":
            return
        allowed = KEPT_SHARE * torch.cuda.get_device_properties(used.device).total_memory
        for key in [*self.arenas]:
            if sum(arena.nbytes for arena in self.arenas.values()) <= allowed:
                return
            if self.arenas[key] is not used:
                del self.arenas[key]
        used.forget_with_holder(self.forget)

    def _step(
        self, arena: Arena, base: Any, forward: Callable[..., Any], arguments: dict[str, Any], length: int
    ) -> Step:
        tokens = arguments["input_ids"].shape[1]
        window = 0
        if arena.capacity:
            window = min(arena.capacity, max(LEAST, 1 << (length + tokens - 1).bit_length()))
        padded = arguments.get("attention_mask") is not None and bool(window)
        key = (tokens, window, padded, arguments["position_ids"].shape[0])
        step = arena.recordings.get(key)
        if step is None:
            step = arena.recordings[key] = Step(arena, base, forward, *key)
        return step

    def _advance(self, step: Step, base: Any) -> torch.Tensor | None:
        """Run a step: the first time as it is (kernels compile), the second time record it, then replay.

        None, with nothing changed, if it is none to record: the forward itself is as good then.
        """
        if step.recorded is None and step.refused is None and step.proven:
            self._record(step, base)
        if step.refused is None and step.recorded is None:
            return self._try(step, base)
        if step.refused is not None:
            self.refused = step.refused
        return None if step.recorded is None else step.recorded.replay()

    def _try(self, step: Step, base: Any) -> torch.Tensor | None:
        """The first run of a step, which finds out whether the host's modules take its inputs."""
        restore = step.arena.snapshot()
        while True:
            try:
                hidden = step.run(base)
            except Exception as error:
                if restore is None:
                    raise
                restore()
                if not step.use_other_experts():
                    self.refused = step.refused = f"a step does not run ({_in_words(error)})"
                    return None
            else:
                step.proven = True
                return hidden

    def _record(self, step: Step, base: Any) -> None:
        """Record a step that has run, or note why it can not be."""
        assert self.recorder is not None
        full = f"more recordings would hold over {MOST_BYTES >> 20} MB"
        if self.full:
            step.refused = full
            return
        try:
            recorded = self.recorder.record(functools.partial(step.run, base))
        except Exception as error:  # whatever a host's modules do that can not be recorded
            step.troubles.append(_in_words(error))
            if step.use_other_experts():
                step.proven = False  # their kernels have to be there first
            else:
                step.refused = f"recording failed ({'; then '.join(step.troubles)})"
            return
        if self.recorder.nbytes > MOST_BYTES:
            self.full = True
            step.refused = full
        else:
            step.recorded = recorded


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
