"""Causal dot product: the definition of the operator, token after token, with the state in one place.

    S <- exp(g_t) S + k_t v_t^T        o_t = q_t^T S

The product of that name of Vyas et al., "Fast Transformers with Clustered Attention" (arXiv:2007.04825), with decay.
4 T K V flops per head, the fewest of all forms, and no memory but the state; but T steps that wait for each other. In
torch each step is a few launches; `causal_dot_product_triton` keeps the state in registers and is one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decay import Decay
from .sequences import operator_of


def _causal_dot_product(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    o = torch.empty_like(v)
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1])
    state = q.new_zeros(shape) if state is None else state.clone()
    factors = None if decay.absent else decay.each_token()
    rows, columns = k.unsqueeze(-1), v.unsqueeze(-2)
    for t in range(q.shape[2]):
        if factors is not None:
            state *= factors[t]
        state.addcmul_(rows[:, :, t], columns[:, :, t])
        o[:, :, t : t + 1] = q[:, :, t : t + 1] @ state
    return o, state if final else None


forward = operator_of(_causal_dot_product)
