"""The operator backward on the GPU: dq forward in time, dv and dk backward in time, and the gradient of log_decay.

With R the gradient that reaches the state from the future, dq_t = scale * S_t do_t, dk_t = R_t v_t, dv_t = R_t^T k_t
and dR obeys the operator's own recurrence with time reversed. So every gradient is one sweep (see ``sweep``).
"""

from __future__ import annotations

import torch

from ..shapes import sequence_count, state_heads, sum_groups
from . import tuning
from .decay_gradient import decay_gradient
from .launch import chunk_slots, sweep
from .launcher import device_index


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

    forward_states = backward_states = config = None
    if need_log_decay:
        # The sweeps of dq and dk hold their states [V, K] alike, and with one configuration the same chunks.
        config = tuning.sweep_config(v.shape[-1], q.shape[-1], q.element_size(), device_index(q))
        slots = chunk_slots(q.shape[1], sequence_count(q, cu_seqlens), q.shape[0], config.chunk, cu_seqlens is not None)
        shape = (slots, heads, v.shape[-1], q.shape[-1])
        # states outgrow float16's range
        dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
        forward_states, backward_states = q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)

    dq, _ = sweep(
        do, v, k, log_decay, heads, state, cu_seqlens,
        scale=scale, transposed=True, chunk_states=forward_states, config=config,
    )  # fmt: skip
    dk, _ = sweep(
        v, do, q, log_decay, heads, dfinal, cu_seqlens,
        scale=scale, reverse=True, transposed=True, chunk_states=backward_states, config=config,
    )  # fmt: skip
    dv, dinitial = sweep(
        k, q, do, log_decay, heads, dfinal, cu_seqlens, scale=scale, reverse=True, final=initial_state is not None
    )
    if dinitial is not None:
        dinitial *= scale
    dlog_decay = None
    if need_log_decay:
        assert log_decay is not None and config is not None
        assert forward_states is not None and backward_states is not None
        dlog_decay = decay_gradient(
            q, k, v, do, log_decay, heads, forward_states, backward_states, cu_seqlens, scale, config.chunk
        )
    return sum_groups(dq, q.shape[2]), sum_groups(dk, k.shape[2]), sum_groups(dv, v.shape[2]), dlog_decay, dinitial
