"""SiLU of a packed projection, split per head into q, k and v; its gradient is written packed by one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .route import route, unit_last_stride, wants_gradient


def silu_split(packed: Tensor, dim: int, *, method: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """packed [B, T, H * 3 * D], per head [q | k | v], to q, k, v [B, T, H, D]: views of its SiLU.

    dim: D. method: as `leet_hf.fused.rotary.turned`. For the gradient only `packed` is kept. A compiler fuses the
    formula by itself, so it gets the formula. Raises ValueError where the last dimension is no multiple of 3 D.
    """
    if packed.dim() != 3 or packed.shape[-1] % (3 * dim):
        raise ValueError(f"packed has shape {list(packed.shape)}, must be [B, T, a multiple of 3 * {dim}]")
    if wants_gradient(packed) and route(method, packed) == "kernel":
        return _SiluSplit.apply(unit_last_stride(packed), dim)
    return _by_formula(packed, dim)


def split_again(packed: Tensor, dim: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]] | None:
    """What makes the results of `silu_split` again, bit for bit; None without gradients, which keep `packed` anyway."""
    if torch.compiler.is_compiling() or not wants_gradient(packed):
        return None
    return functools.partial(_by_formula, packed.detach(), dim)


def _by_formula(packed: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.silu(packed).unflatten(-1, (-1, 3 * dim)).chunk(3, dim=-1)
    return q, k, v


class _SiluSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(packed)
        return _by_formula(packed, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None]:
        from .silu_split_kernel import silu_split_backward  # imports triton

        (packed,) = ctx.saved_tensors
        return silu_split_backward(packed, *(unit_last_stride(x) for x in (dq, dk, dv))), None
