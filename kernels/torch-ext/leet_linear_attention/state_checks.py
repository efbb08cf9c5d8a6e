"""Checks of what a decode state is given: its tokens, a step's arguments, a state to become."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import PASSED, TOKEN_SHAPES, check_log_decay, check_query, check_tensor, check_values_of, fail, remember

if TYPE_CHECKING:
    from .state import DecodeState


def check_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: DecodeState) -> None:
    """Raise ValueError or TypeError unless `linear_attention_step` can advance `state` by these tokens."""
    if not hasattr(state, "cursor"):
        raise TypeError(
            f"state is a {type(state).__name__}; it must be a DecodeState: make one with DecodeState.allocate(...)"
        )
    key = None if torch.compiler.is_compiling() else _step_metadata(q, k, v, log_decay, scale, state)
    if key is not None and key in PASSED:  # a compiler would guard the set even for None
        if log_decay is not None:
            check_values_of(log_decay)
        return
    check_append(k, v, log_decay, state)
    check_query(q, scale)
    batch, heads, key_dim, _ = state.base.shape
    if q.shape[0] != batch or q.shape[1] != k.shape[1] or q.shape[3] != key_dim:
        wanted = f"[B, T, Hq, K] = [{batch}, {k.shape[1]}, Hq, {key_dim}] as k and the decode state have"
        fail("q", f"has shape {list(q.shape)}", wanted, "give q, k and v the same tokens")
    if heads % q.shape[2]:
        wanted = f"a number that divides the {heads} heads of the decode state"
        fail("q", f"has {q.shape[2]} heads", wanted, "repeat or drop heads")
    _check_like_state("q", q, state.keys)
    remember(key)


def check_append(k: Tensor, v: Tensor, log_decay: Tensor | None, state: DecodeState) -> None:
    """Raise ValueError or TypeError unless `state` can hold these tokens."""
    for name, x, ring in (("k", k, state.keys), ("v", v, state.values)):
        check_tensor(name, x)
        if x.dim() != 4 or x.shape[0] != ring.shape[0] or x.shape[2:] != ring.shape[2:] or x.shape[1] != k.shape[1]:
            batch, _, heads, width = ring.shape
            tokens = f"T={k.shape[1]}" if name == "v" else "T"
            fail(
                name,
                f"has shape {list(x.shape)}",
                f"{TOKEN_SHAPES[name]} = [{batch}, {tokens}, {heads}, {width}] as the decode state was allocated",
                "allocate a state for these heads and dims, or use state.select / state.repeat to change its batch",
            )
        _check_like_state(name, x, ring)
    if k.shape[1] > state.buffer:
        fail(
            "k",
            f"brings T={k.shape[1]} tokens",
            f"at most the decode state's buffer of {state.buffer}",
            "allocate a larger buffer, or use linear_attention from state.fold() on and state.load its final state",
        )
    if log_decay is not None:
        check_log_decay(log_decay, k)
        heads = state.base.shape[1]
        if heads % log_decay.shape[-1]:
            fail(
                "log_decay",
                f"has {log_decay.shape[-1]} heads",
                f"a number that divides the {heads} heads of the decode state",
                "repeat or drop heads",
            )


def check_load(state: Tensor, target: DecodeState) -> None:
    """Raise ValueError or TypeError unless `target` can become `state`."""
    check_tensor("state", state)
    if state.shape != target.base.shape:
        fail(
            "state",
            f"has shape {list(state.shape)}",
            f"[B, H, K, V] = {list(target.base.shape)} as the decode state was allocated",
            "allocate a decode state of this shape",
        )


def _step_metadata(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, state: DecodeState
) -> tuple[object, ...] | None:
    """All that is checked of a step's arguments but the values of log_decay; None where one is no plain tensor."""
    base, keys, values = state.base, state.keys, state.values
    seen: list[object] = [type(scale), base.shape, keys.shape, values.shape, keys.dtype, keys.device, state.buffer]
    for x in (q, k, v, log_decay):
        if x is None:
            seen.append(None)
        elif type(x) in (Tensor, torch.nn.Parameter):
            seen += (x.shape, x.dtype, x.device)
        else:
            return None
    return tuple(seen)


def _check_like_state(name: str, x: Tensor, ring: Tensor) -> None:
    if x.dtype != ring.dtype:
        remedy = "convert it, or allocate the state with this dtype"
        fail(name, f"is {x.dtype}", f"the decode state's dtype {ring.dtype}", remedy)
    if x.device != ring.device:
        fail(
            name,
            f"is on {x.device}",
            f"the decode state's device {ring.device}",
            "move it, or allocate the state there",
        )
