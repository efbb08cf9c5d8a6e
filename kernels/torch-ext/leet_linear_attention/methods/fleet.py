"""FleetAttention: for each key channel c, multiply and take a discounted cumulative sum over time.

    y_t = exp(g_t) y_{t-1} + k_tc v_t        o_t = sum_c q_tc y_t        y: row c of the state, over all of time

The form of LeetDecoding (arXiv:2501.02573). Channels do not meet before the last sum, so there is no state matrix to
wait for; each of K channels passes over v and o instead. The cumulative sum here doubles its reach: after round j a
token holds the last 2^j tokens, and takes over those of the token 2^j before it, decayed by exp of a difference of
sums <= 0. Dividing by a power of the decay, which underflows, never comes up. K (3 + 2 log2 T) T V flops per head, as
many memory accesses, and two tensors like v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decay
from .sequences import operator_of


def discounted_cumsum(x: Tensor, reaches: list[Tensor]) -> Tensor:
    """`y_t = exp(g_t) y_{t-1} + x_t` over dimension 2 of `x` `[B, H, T, D]`, in place.

    `reaches[j]` holds the decay from the token 2^j before to each token that has one. Without decay pass `[]` to
    `Tensor.cumsum` instead: it needs no rounds.
    """
    for j, factor in enumerate(reaches):
        x[:, :, 1 << j :] += factor * x[:, :, : -(1 << j)]
    return x


def _fleet(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    tokens, channels = q.shape[2:]
    o = torch.zeros_like(v)
    last = q.new_zeros(*q.shape[:2], channels, v.shape[-1]) if final else None
    if tokens == 0:
        return o, last if last is None or state is None else state.clone()
    first = decay.from_start(0, 1)
    reaches = [] if decay.absent else [decay.back(1 << j) for j in range((tokens - 1).bit_length())]
    for c in range(channels):
        y = k[..., c, None] * v
        if state is not None:
            y[:, :, :1] += first * state[:, :, c, None]
        y = y.cumsum_(2) if decay.absent else discounted_cumsum(y, reaches)
        o.addcmul_(q[..., c, None], y)
        if last is not None:
            last[:, :, c] = y[:, :, -1]
    return o, last


forward = operator_of(_fleet)
