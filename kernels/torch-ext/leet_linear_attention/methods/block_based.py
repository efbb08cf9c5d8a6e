"""Block-based: the recurrence inside all blocks side by side, then one state from block to block.

With blocks of C tokens, each begun with an empty state, the C steps of the recurrence are taken in every block at once;
then the states pass from block to block, and every token reads the state that entered its block:

    o = recurrence(block) + exp(from the block's start) q S        S <- exp(over the block) S + S(block)

The block form of LeetDecoding (arXiv:2501.02573) with its causal dot product inside; `lightning` is the same form with
the quadratic product inside. C is about sqrt(T), so that C + T / C = 2 sqrt(T) steps wait for each other instead of T,
at (6 K V) T flops per head and sqrt(T) states in memory: much for elementwise work that reads and writes all of them C
times, and little where steps are what one waits for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .decay import Decay
from .sequences import operator_of


def _block_based(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    tokens = q.shape[2]
    size = max(1, math.isqrt(tokens))
    whole = tokens // size
    o = torch.empty_like(v)
    inside = _inside(q, k, v, decay, size, whole, o)
    last = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if state is None else state
    for i, own in enumerate(inside):
        block = slice(i * size, min((i + 1) * size, tokens))
        a, b = block.start, block.stop
        o[:, :, block] += (q[:, :, block] * decay.from_start(a, b)) @ last
        last = own + decay.state_after(last, a, b)
    return o, last if final else None


def _inside(q: Tensor, k: Tensor, v: Tensor, decay: Decay, size: int, whole: int, o: Tensor) -> list[Tensor]:
    """Fill o with what each token sees of its own block; the state `[B, H, K, V]` each block leaves by itself."""
    tokens = q.shape[2]
    factors = None if decay.absent else decay.each_token()
    states: list[Tensor] = []
    # The whole blocks as one more dimension; what is left at the end is a block of its own.
    for a, b, steps in ((0, whole * size, size), (whole * size, tokens, tokens - whole * size)):
        if a == b:
            continue
        qs, ks, vs, os = (x[:, :, a:b].unflatten(2, (-1, steps)) for x in (q, k, v, o))
        gs = None if factors is None else factors[a:b].unflatten(0, (-1, steps)).permute(2, 3, 0, 1, 4, 5)
        S = q.new_zeros(*qs.shape[:3], q.shape[-1], v.shape[-1])
        for t in range(steps):
            if gs is not None:
                S *= gs[:, :, :, t]
            S.addcmul_(ks[:, :, :, t, :, None], vs[:, :, :, t, None, :])
            os[:, :, :, t] = (qs[:, :, :, t, None, :] @ S).squeeze(-2)
        states += S.unbind(2)
    return states


forward = operator_of(_block_based)
