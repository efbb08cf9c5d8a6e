"""Kernels of rows sorted by experts: the sum of each token's rows, and the gradients of that."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leet_linear_attention.triton.launcher import Launcher, device_index

WIDEST = 2048  # entries of a row at once


@triton.jit(do_not_specialize=["TOP"])
def summed_kernel(
    rows_ptr, place_ptr, end_ptr, share_ptr, out_ptr, TOP,
    D: tl.constexpr, BD: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """out [T, D], the sum over a token's rows [T * TOP, D] at place [T, TOP], times share [T, TOP] if there is one.

    Grid (T,). Rows from end [1] on hold nothing. ROUNDED: products are rounded to the rows' dtype.
    """
    t = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        total = tl.zeros((BD,), dtype=tl.float32)
        for j in range(0, TOP):
            place = tl.load(place_ptr + t * TOP + j).to(tl.int64)
            row = tl.load(rows_ptr + place * D + d, mask=d < tl.where(place < end, D, 0), other=0.0).to(tl.float32)
            if share_ptr is not None:
                row *= tl.load(share_ptr + t * TOP + j).to(tl.float32)
                if ROUNDED:
                    row = row.to(rows_ptr.dtype.element_ty).to(tl.float32)
            total += row
        tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["TOP"])
def summed_backward_kernel(
    dout_ptr, rows_ptr, place_ptr, end_ptr, share_ptr, drows_ptr, dshare_ptr, TOP,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """drows [T * TOP, D] and dshare [T, TOP] float32, of ``summed_kernel`` with a share. Grid (T * TOP,).

    Rows from end on are given zeros.
    """
    pair = tl.program_id(0).to(tl.int64)
    t = pair // TOP
    place = tl.load(place_ptr + pair).to(tl.int64)
    width = tl.where(place < tl.load(end_ptr), D, 0)
    share = tl.load(share_ptr + pair).to(tl.float32)
    products = tl.zeros((BD,), dtype=tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        dout = tl.load(dout_ptr + t * D + d, mask=d < width, other=0.0).to(tl.float32)
        products += dout * tl.load(rows_ptr + place * D + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(drows_ptr + place * D + d, (dout * share).to(drows_ptr.dtype.element_ty), mask=d < D)
    tl.store(dshare_ptr + pair, tl.sum(products, 0))


_summed, _summed_backward = Launcher(summed_kernel), Launcher(summed_backward_kernel)


def summed(rows: torch.Tensor, place: torch.Tensor, end: torch.Tensor, share: torch.Tensor | None) -> torch.Tensor:
    """rows [T * TOP, D] contiguous, place [T, TOP] int64, end [1], share [T, TOP] or None, to [T, D] in rows' dtype."""
    tokens, top = place.shape
    width = rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        rounded = share is not None and share.dtype == rows.dtype
        constants = (width, min(triton.next_power_of_2(width), WIDEST), rounded)
        _summed((tokens,), device_index(rows), (rows, place, end, share, out), (top,), constants, 4, 1)
    return out


def summed_backward(
    dout: torch.Tensor, rows: torch.Tensor, place: torch.Tensor, end: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows, in their dtype, and of share, float32, of `summed`; all contiguous."""
    tokens, top = place.shape
    width = rows.shape[1]
    drows, dshare = torch.empty_like(rows), share.new_empty(share.shape, dtype=torch.float32)
    if rows.numel():
        _summed_backward(
            (tokens * top,), device_index(rows), (dout, rows, place, end, share, drows, dshare), (top,),
            (width, min(triton.next_power_of_2(width), WIDEST)), 4, 1,
        )  # fmt: skip
    return drows, dshare
