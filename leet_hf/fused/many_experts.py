"""Experts of a mixture for many tokens on a GPU: what the host's "grouped_mm" does, in fewer passes over memory.

Tokens are sorted by experts, all experts' products are one call of torch, and a token's rows are summed where they lie.
The host goes over the rows five times for that, in float32, and masks them three times in some versions, for processes
that hold a part of the experts; here a row that no expert of this process computed is left out of the sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_form import may_stand_in
from .route import route

STANDS_FOR = ("grouped_mm",)


def serves(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> bool:
    """Whether `many_tokens` stands for the host's forward of these experts and tokens on a GPU."""
    if not hidden_states.is_cuda or not may_stand_in(experts, top_k_index, STANDS_FOR, "cuda"):
        return False
    if not experts.__dict__.get("is_concatenated", False):
        return False
    into_up, into_down = experts._parameters["gate_up_proj"], experts._parameters["down_proj"]
    if hidden_states.dim() != 2 or top_k_weights.shape != top_k_index.shape:
        return False
    if not top_k_index.numel() or hidden_states.dtype != into_up.dtype:
        return False
    if route("auto", hidden_states, top_k_weights, into_up, into_down) != "kernel":
        return False
    return grouped_in_one_call(into_up) and grouped_in_one_call(into_down)


def grouped_in_one_call(weight: Tensor) -> bool:
    """Whether torch multiplies by this weight [E, N, D] of experts in one kernel, without asking the device."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:]) and weight.data_ptr() % 16 == 0
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and aligned
        and torch.cuda.get_device_capability(weight.device)[0] >= 9
    )


def many_tokens(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of each token's experts, as the host's implementations compute it.

    hidden_states [T, hidden], top_k_index and top_k_weights [T, top k]; an index past the experts that there are is
    that of another process. Returns [T, hidden]. Gradients of hidden_states, top_k_weights and the weights.
    """
    into_up, into_down = experts.gate_up_proj, experts.down_proj
    number, top = into_down.shape[0], top_k_index.shape[1]
    # A narrow integer is sorted in fewer passes.
    narrow = top_k_index.reshape(-1).to(torch.uint8 if number < 256 else torch.int16)
    order, pairs = torch.sort(narrow, stable=True)
    place = torch.empty_like(pairs)
    place[pairs] = torch.arange(len(pairs), device=pairs.device)
    place = place.view_as(top_k_index)
    bounds = torch.searchsorted(order, torch.arange(number, device=pairs.device, dtype=narrow.dtype), right=True)
    ends = bounds.to(torch.int32)
    rows = Spread.apply(hidden_states, pairs if top == 1 else pairs // top, place, ends[-1:])
    between = experts._apply_gate(F.grouped_mm(rows, into_up.transpose(-2, -1), offs=ends))
    out = F.grouped_mm(between, into_down.transpose(-2, -1), offs=ends)
    return Summed.apply(out, place, ends[-1:], top_k_weights)


class Spread(torch.autograd.Function):
    """x [T, D] to rows [T * top k, D], sorted by experts: row i is that of token source[i]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(place, end)
        return x.index_select(0, source)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
        from .expert_rows_kernel import summed

        place, end = ctx.saved_tensors
        return summed(drows.contiguous(), place, end, None), None, None, None


class Summed(torch.autograd.Function):
    """rows [T * top k, D], at place [T, top k], times share [T, top k], to their sums [T, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, end: Tensor, share: Tensor) -> Tensor:
        from .expert_rows_kernel import summed

        rows, share = rows.contiguous(), share.contiguous()
        ctx.save_for_backward(rows, place, end, share)
        return summed(rows, place, end, share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        from .expert_rows_kernel import summed_backward

        rows, place, end, share = ctx.saved_tensors
        drows, dshare = summed_backward(dout.contiguous(), rows, place, end, share)
        return drows, None, None, dshare.to(share.dtype)
