"""The operator backward on the GPU: dq forward in time, dv and dk backward in time, and the gradient of log_decay.

With R the gradient that reaches the state from the future, dq_t = scale * S_t do_t, dk_t = R_t v_t, dv_t = R_t^T k_t
and dR obeys the operator's own recurrence with time reversed. So every gradient is one sweep (see ``sweep``).

What the passes need besides lies, where there is room, in gradients that are not written yet: parts and state heads to
be summed in those of later passes, the states before the chunks in those of k and v.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch

from ..shapes import state_heads
from . import tuning
from .decay_gradient import decay_gradient
from .launch import Operands, Plans, Sweep, Terms, form_of

_plans = Plans()
# The passes by whose gradient they give.
QUERIES, VALUES, KEYS = 0, 1, 2
# The order where nothing is summed: each with the pass whose gradient's memory it uses.
IN_TURN: tuple[tuple[int, int | None], ...] = ((QUERIES, None), (VALUES, None), (KEYS, None))


def backward(
    do: torch.Tensor,
    dfinal: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    need_log_decay: bool,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v (their shapes and dtype), log_decay (its shape, if needed) and initial_state (if given).

    ``do`` [B, T, H, V] and ``dfinal`` [N, H, K, V] or None are the gradients of the operator's results.
    """
    heads = state_heads(q, k, v, log_decay, initial_state)
    do = do if do.stride(-1) == 1 else do.contiguous()
    do = do.to(q.dtype)
    state = initial_state.contiguous() if initial_state is not None else None
    # Backward in time the state gathers q do^T, and results are scaled on their way out, so that no rounding of scaled
    # inputs enters it; what comes from dfinal goes in divided. With a scale of 0 only dfinal is left of the gradient.
    if scale == 0.0:
        do, scale = torch.zeros_like(do), 1.0
    if dfinal is not None:
        dfinal = dfinal.contiguous() / scale

    passes = tuple(Operands(*abc, log_decay, cu_seqlens) for abc in ((do, v, k), (k, q, do), (v, do, q)))
    sweeps, order = _plans.of(
        (form_of(do, q, k, v, log_decay, cu_seqlens), q.device, heads, scale, need_log_decay, batch_invariant),
        lambda: _sweeps(passes, (q, v, k), heads, scale, need_log_decay, batch_invariant),
    )
    queries, values, keys = sweeps
    gradients = dq, dv, dk = q.new_empty(q.shape), v.new_empty(v.shape), k.new_empty(k.shape)
    written: dict[int, torch.Tensor] = {}
    chunk_states = terms = scores = None
    if need_log_decay:
        # The state before every chunk goes from the pass of dq to that of dk, which has the same chunks.
        written = {KEYS: keys.written(dk), VALUES: values.written(dv)}
        chunk_states = keys.chunk_states(q, written[KEYS], written[VALUES])
        terms = Terms(k, q.new_empty((2, keys.tiles, *q.shape[:2], heads), dtype=torch.float32))
    else:
        # The passes for q and k have the same scores: the directions of time and the places of do and v are opposite.
        scores = queries.scores(passes[QUERIES])

    # Where nothing is summed the passes read nothing of one another (but for terms), so that the next begins where one
    # leaves processors idle. Segments come with launches of their own, and with states that are given back when their
    # pass was launched.
    beside = order == IN_TURN and queries.cut.number == values.cut.number == 1
    wanted = initial_state is not None
    segments = dinitial = None
    for i, spare in order:
        into = written.get(i)
        if into is None:
            into = sweeps[i].written(gradients[i], None if spare is None else gradients[spare])
        if i == QUERIES:
            queries.run(passes[i], state, out=dq, written=into, chunk_states=chunk_states, scores=scores)
            continue
        if segments is None:  # both passes backward in time have the same states, seen from either side
            segments, dinitial = values.segments(passes[VALUES], dfinal, wanted)
        if i == VALUES:
            _, last = values.run(
                passes[i], dfinal, out=dv, written=into, final=wanted, segments=segments, beside=beside
            )
            dinitial = last if dinitial is None else dinitial
        else:
            keys.run(
                passes[i], dfinal, out=dk, written=into, segments=segments, chunk_states=chunk_states, terms=terms,
                scores=scores, beside=beside,
            )  # fmt: skip
    if dinitial is not None:
        dinitial *= scale
    dlog_decay = None
    if terms is not None and log_decay is not None:
        dlog_decay = decay_gradient(terms.out, log_decay, cu_seqlens, scale, keys.config.chunk)
    return dq, dk, dv, dlog_decay, dinitial


def _sweeps(
    passes: tuple[Operands, ...],
    inputs: tuple[torch.Tensor, ...],
    heads: int,
    scale: float,
    need_log_decay: bool,
    batch_invariant: bool,
) -> tuple[tuple[Sweep, Sweep, Sweep], tuple[tuple[int, int | None], ...]]:
    """The passes for the gradients of the inputs q, v and k, and their order, each with whose memory it may sum in."""
    options: dict[str, Any] = {"scale": scale, "whole": batch_invariant}
    queries = Sweep(passes[QUERIES], heads, transposed=True, **options)
    values = Sweep(passes[VALUES], heads, reverse=True, **options)
    config = tuning.with_terms(queries.config) if need_log_decay else None
    sweeps = queries, values, Sweep(passes[KEYS], heads, reverse=True, transposed=True, config=config, **options)
    if need_log_decay:
        return sweeps, ((QUERIES, None), (KEYS, None), (VALUES, None))
    summed = [sweep.summed(x.shape[2]) for sweep, x in zip(sweeps, inputs, strict=True)]
    if not any(summed):
        return sweeps, IN_TURN

    def lent(order: tuple[int, ...]) -> list[int | None]:
        """For each pass of an order the largest gradient that is still to be written."""
        return [max(later, key=lambda i: inputs[i].numel()) if (later := order[n:]) else None for n in (1, 2, 3)]

    def missing(order: tuple[int, ...]) -> list[int]:
        """What each pass needs and finds no room for, the most first: one lives at a time."""
        room = [0 if i is None else inputs[i].numel() for i in lent(order)]
        return sorted((summed[i] if summed[i] > free else 0 for i, free in zip(order, room, strict=True)), reverse=True)

    order = min(permutations(range(3)), key=missing)
    return sweeps, tuple(zip(order, lent(order), strict=True))
