"""The operator backward on the GPU: dq forward in time, dv and dk backward in time, and the gradient of log_decay.

With R the gradient that reaches the state from the future, dq_t = scale * S_t do_t, dk_t = R_t v_t, dv_t = R_t^T k_t
and dR obeys the operator's own recurrence with time reversed. So every gradient is one sweep (see ``sweep``).
"""

from __future__ import annotations

from typing import Any

import torch

from ..shapes import sequence_count, state_heads, sum_groups
from . import tuning
from .decay_gradient import decay_gradient
from .launch import Operands, Plans, Sweep, Terms, chunk_slots, form_of

_plans = Plans()


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
    queries, values, keys = _plans.of(
        (form_of(do, q, k, v, log_decay, cu_seqlens), q.device, heads, scale, need_log_decay, batch_invariant),
        lambda: _sweeps(passes, heads, scale, need_log_decay, batch_invariant),
    )
    chunk_states = terms = None
    if need_log_decay:
        # The state before every chunk goes from the pass of dq to that of dk, which has the same chunks.
        chunk, packed = keys.config.chunk, cu_seqlens is not None
        slots = chunk_slots(q.shape[1], sequence_count(q, cu_seqlens), q.shape[0], chunk, packed)
        # states outgrow float16's range
        dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
        chunk_states = q.new_empty((slots, heads, v.shape[-1], q.shape[-1]), dtype=dtype)
        terms = Terms(k, q.new_empty((2, keys.tiles, *q.shape[:2], heads), dtype=torch.float32))

    # The passes for q and k have the same scores, as the directions of time and the places of do and v are opposite.
    scores = None if need_log_decay else queries.scores(passes[0])
    dq, _ = queries.run(passes[0], state, chunk_states=chunk_states, scores=scores)
    dq = sum_groups(dq, q.shape[2])
    # Both passes backward in time have the same states, seen from either side.
    wanted = initial_state is not None
    segments, dinitial = values.segments(passes[1], dfinal, wanted)
    # The three passes read nothing of one another (but for terms), so that the next begins where one leaves processors
    # idle. Segments come with launches of their own, and with states that are given back when their pass was launched.
    beside = terms is None and queries.cut.number == values.cut.number == 1
    dv, last = values.run(passes[1], dfinal, final=wanted, segments=segments, beside=beside)
    dv = sum_groups(dv, v.shape[2])  # one gradient per state head lives at a time
    dinitial = last if dinitial is None else dinitial
    dk, _ = keys.run(
        passes[2], dfinal, segments=segments, chunk_states=chunk_states, terms=terms, scores=scores, beside=beside
    )
    if dinitial is not None:
        dinitial *= scale
    dlog_decay = None
    if terms is not None and log_decay is not None:
        dlog_decay = decay_gradient(terms.out, log_decay, cu_seqlens, scale, keys.config.chunk)
    return dq, sum_groups(dk, k.shape[2]), dv, dlog_decay, dinitial


def _sweeps(
    passes: tuple[Operands, ...], heads: int, scale: float, need_log_decay: bool, batch_invariant: bool
) -> tuple[Sweep, Sweep, Sweep]:
    """The passes for the gradients of q, v and k."""
    options: dict[str, Any] = {"scale": scale, "whole": batch_invariant}
    queries = Sweep(passes[0], heads, transposed=True, **options)
    values = Sweep(passes[1], heads, reverse=True, **options)
    config = tuning.with_terms(queries.config) if need_log_decay else None
    return queries, values, Sweep(passes[2], heads, reverse=True, transposed=True, config=config, **options)
