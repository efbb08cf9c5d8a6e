"""Lightning attention: vanilla inside blocks of tokens, one state from block to block.

Qin et al., "Lightning Attention-2" (arXiv:2401.04658). With S the state entering a block,

    o = (mask * (q k^T)) v + exp(from the block's start) q S
    S <- exp(over the block) S + (exp(to the block's end) k)^T v

2 T (C (K + V) + 2 K V) flops per head with blocks of C tokens, all of them in matrix products, and C^2 scores in
memory; T / C steps that wait for each other. The default methods are this algorithm too: "triton" with the state in
registers, "torch" with all blocks of a segment in one product. Here it stands in its plain form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decay
from .sequences import operator_of

BLOCK = 256


def _lightning(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    tokens = q.shape[2]
    o = torch.empty_like(v)
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    for a in range(0, tokens, BLOCK):
        b = min(a + BLOCK, tokens)
        block = slice(a, b)
        inside = (q[:, :, block] @ k[:, :, block].transpose(-1, -2)).mul_(decay.pairs(a, b)) @ v[:, :, block]
        o[:, :, block] = inside.add_((q[:, :, block] * decay.from_start(a, b)) @ state)
        update = (k[:, :, block] * decay.to_end(a, b)).transpose(-1, -2) @ v[:, :, block]
        state = update.add_(decay.state_after(state, a, b))
    return o, state if final else None


forward = operator_of(_lightning)
