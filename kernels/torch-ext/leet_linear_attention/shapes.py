"""What the shapes of the arguments imply, in one place."""

from __future__ import annotations

import torch


def state_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> int:
    """H, the number of state heads: the most heads among q, k, v [B, T, heads, D], log_decay and state [N, H, K, V]."""
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    if log_decay is not None:
        heads = max(heads, log_decay.shape[-1])
    if state is not None:
        heads = max(heads, state.shape[1])
    return heads


def sequence_count(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """N: packed sequences, or rows of the batch."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
