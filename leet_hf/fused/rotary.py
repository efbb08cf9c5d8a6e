"""Rotary positions: q and k of a layer turned together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .route import route, unit_last_stride, wants_gradient

# Which dims make a pair, of the R that are turned (the rest is kept): (i, i + R/2), with tables of R/2 columns; the
# same with tables of R columns, as Transformers makes them; or (2i, 2i + 1), with tables of R/2 columns.
KINDS = ("rope", "rope_twice", "theta_shift")


def turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str = "rope", *, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q and k with each pair of dims turned by its angle: `(x1 cos - x2 sin, x2 cos + x1 sin)` (arXiv 2104.09864).

    Args:
        q, k: [B, T, Hq, D] and [B, T, Hk, D], any strides.
        cos, sin: [B or 1, T, 1, R/2], R <= D; [B or 1, T, 1, R] for kind "rope_twice". The first R dims are turned.
        kind: "rope", "rope_twice" or "theta_shift", which say what makes a pair.
        method: of the linear attention around, which says whether kernels are wanted (`leet_hf.fused.route`).

    Returns q and k turned, in their dtypes, contiguous where a kernel made them. A kernel computes in float32 and
    rounds once; torch computes in the wider dtype of x and the tables. Raises ValueError for an unknown kind and for
    tables that do not fit.
    """
    _check(q, k, cos, sin, kind)
    way = route(method, q, k, cos, sin)
    if way == "torch" or q.dtype != k.dtype or cos.dtype == torch.float64 or wants_gradient(cos, sin):
        return _by_formula(q, cos, sin, kind), _by_formula(k, cos, sin, kind)
    q, k, cos, sin = (unit_last_stride(x) for x in (q, k, cos, sin))
    if way == "operator":
        return torch.ops.leet_hf.rotary(q, k, cos, sin, kind, False)
    if wants_gradient(q, k):
        return _Turned.apply(q, k, cos, sin, kind, False)
    return _turn(q, k, cos, sin, kind, False)


def _by_formula(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    wide = torch.promote_types(x.dtype, cos.dtype)
    channels = cos.shape[-1] if kind == "rope_twice" else 2 * cos.shape[-1]
    kept = x[..., channels:]
    x_wide = (x[..., :channels] if kept.shape[-1] else x).to(wide)
    if kind == "theta_shift":
        first, second = x_wide.unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        made = pairs.flatten(-2).to(x.dtype)
    else:
        first, second = x_wide.chunk(2, dim=-1)
        (cos1, cos2), (sin1, sin2) = (
            table.chunk(2, dim=-1) if kind == "rope_twice" else (table, table) for table in (cos, sin)
        )
        made = torch.cat((first * cos1 - second * sin1, second * cos2 + first * sin2), dim=-1).to(x.dtype)
    return torch.cat((made, kept), dim=-1) if kept.shape[-1] else made


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, must be one of {', '.join(map(repr, KINDS))}")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q and k have shapes {list(q.shape)} and {list(k.shape)}, must be [B, T, Hq, D] and [B, T, Hk, D]"
        )
    channels = cos.shape[-1] if kind == "rope_twice" else 2 * cos.shape[-1]
    fits = cos.dim() == 4 and cos.shape[0] in (1, q.shape[0]) and cos.shape[1:3] == (q.shape[1], 1)
    if not fits or sin.shape != cos.shape or channels > q.shape[-1] or channels % 2:
        raise ValueError(
            f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}, must be [{q.shape[0]} or 1, "
            f"{q.shape[1]}, 1, columns] for {q.shape[-1]} channels and kind {kind!r}"
        )


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, transposed: bool) -> tuple[Tensor, Tensor]:
    """One launch. transposed: by the transposed matrices, which are the rotations back."""
    from .rotary_kernel import turn  # imports triton

    return turn(q, k, cos, sin, kind, transposed)


def _turn_fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: str, transposed: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Turned(torch.autograd.Function):
    """Keeps the tables only: the gradient of a rotation is turned back, whatever was turned."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        # The context comes first: apart from it, autograd would look up the signature at every call.
        _setup_context(ctx, arguments, None)
        return _turn(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = unit_last_stride(dq), unit_last_stride(dk)
        return *_turn(dq, dk, cos, sin, ctx.kind, not ctx.transposed), None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, kind, transposed = inputs
    ctx.save_for_backward(cos, sin)
    ctx.kind, ctx.transposed = kind, transposed


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    dq, dk = unit_last_stride(dq), unit_last_stride(dk)
    return *torch.ops.leet_hf.rotary(dq, dk, cos, sin, ctx.kind, not ctx.transposed), None, None, None, None


_library = torch.library.Library("leet_hf", "FRAGMENT")
_library.define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, str kind, bool transposed) -> (Tensor, Tensor)")
_library.impl("rotary", _turn, "CompositeExplicitAutograd")
torch.library.register_fake("leet_hf::rotary", _turn_fake, lib=_library)
torch.library.register_autograd("leet_hf::rotary", _differentiate, setup_context=_setup_context, lib=_library)
