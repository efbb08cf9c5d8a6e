"""Recursion: both halves of the sequence by themselves, then what the later half sees of the earlier.

    o(left + right) = [o(left), o(right) + exp(from the middle) q(right) S(left)]
    S(left + right) = exp(over right) S(left) + S(right)

The cross term has the rank of the state, K, however long the halves. A half is done the same way, down to LEAF tokens,
which are done as in vanilla. 2 T (LEAF (K + V) + K V (1 + log2(T / LEAF) / 2)) flops per head, log2(T / LEAF) passes
over half of q and o, and one state per level in memory. Halves of one level need not wait for each other: a tree of
states instead of a chain (here they are taken in turn).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decay
from .sequences import operator_of

LEAF = 128


def _recursion(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    tokens = q.shape[2]
    o = torch.empty_like(v)

    def span(a: int, b: int) -> Tensor:
        """Fill o of tokens a to b as if nothing came before, and return the state they leave."""
        here = slice(a, b)
        if b - a <= LEAF:
            scores = (q[:, :, here] @ k[:, :, here].transpose(-1, -2)).mul_(decay.pairs(a, b))
            o[:, :, here] = scores @ v[:, :, here]
            return (k[:, :, here] * decay.to_end(a, b)).transpose(-1, -2) @ v[:, :, here]
        middle = (a + b) // 2
        left, right = span(a, middle), span(middle, b)
        o[:, :, middle:b] += (q[:, :, middle:b] * decay.from_start(middle, b)) @ left
        return right.add_(decay.state_after(left, middle, b))

    last = span(0, tokens)
    if state is not None:
        o += (q * decay.from_start(0, tokens)) @ state
        last += decay.state_after(state, 0, tokens)
    return o, last if final else None


forward = operator_of(_recursion)
