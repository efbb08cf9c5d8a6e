"""The operator forward on the GPU: one sweep forward in time."""

from __future__ import annotations

import torch

from ..shapes import state_heads
from .launch import Operands, Plans, Sweep, form_of

_plans = Plans()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    output_final_state: bool,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decayed linear attention; arguments as ``linear_attention``'s, already checked."""
    heads = state_heads(q, k, v, log_decay, initial_state)
    state = initial_state.contiguous() if initial_state is not None else None
    x = Operands(q, k, v, log_decay, cu_seqlens)
    sweep = _plans.of(
        (form_of(*x), q.device, heads, scale, batch_invariant),
        lambda: Sweep(x, heads, scale=scale, whole=batch_invariant),
    )
    return sweep.run(x, state, final=output_final_state)
