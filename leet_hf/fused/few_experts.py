"""Experts of a mixture for one token on a CPU: two products for each expert it chose.

The host's "grouped_mm" sorts tokens by experts first, which for one token takes longer than the products; from two
tokens on it is as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .expert_form import may_stand_in

STANDS_FOR = ("grouped_mm", "batched_mm")


def serves(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> bool:
    """Whether this is one token in float32 on a CPU, without gradients, and nothing watches or changes the call."""
    if hidden_states.shape[:-1] != (1,) or not may_stand_in(experts, top_k_index, STANDS_FOR, "cpu"):
        return False
    weights = experts._parameters
    tensors = (hidden_states, top_k_weights, weights["gate_up_proj"], weights["down_proj"])
    for x in tensors:
        if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or x.dtype != torch.float32:
            return False
    return (
        not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def one_token(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of a token's experts, as the host's implementations compute it, without gradients.

    hidden_states [1, hidden], top_k_index and top_k_weights [1, top k]. Returns [1, hidden].
    """
    into_up, into_down = experts.gate_up_proj, experts.down_proj
    chosen = top_k_index.tolist()[0]
    between = experts._apply_gate(torch.cat([F.linear(hidden_states, into_up.select(0, one)) for one in chosen]))
    rows = between.chunk(len(chosen))
    each = [F.linear(row, into_down.select(0, one)) for row, one in zip(rows, chosen, strict=True)]
    return torch.mm(top_k_weights, torch.cat(each))
