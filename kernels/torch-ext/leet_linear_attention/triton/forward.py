"""The operator forward on the GPU: one sweep forward in time."""

from __future__ import annotations

import torch

from ..shapes import state_heads
from .launch import Sweep


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
    sweep = Sweep(q, k, v, log_decay, heads, cu_seqlens, scale=scale, whole=batch_invariant)
    return sweep.run(state, final=output_final_state)
