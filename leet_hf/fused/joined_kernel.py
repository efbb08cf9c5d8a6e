"""Kernels of linear layers with few rows: several of one input, and a pair with the gated unit that follows it.

Every program reads some rows of one weight, or of both of a pair. With a single row of input it reads their first tile
before what it waits for inside `overlapping` has ended: weights are no result of the launch in front.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leet_linear_attention.triton.common import dot
from leet_linear_attention.triton.launcher import Launcher

from .glu_kernel import activated


@triton.jit
def _tile(tile, N, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """(rows n [BN] of a weight [N, D], places d [BD] in a row, which rows there are [BN, 1], their offsets [BN, 1])."""
    n = tile * BN + tl.arange(0, BN)
    return n, tl.arange(0, BD), (n < N)[:, None], n.to(tl.int64)[:, None] * D


@triton.jit
def _one_row(x_ptr, w_rows, d, mask_n, first, D: tl.constexpr, BD: tl.constexpr):
    """The single row x [D] times a weight's rows at w_rows, of whose first tile `first` has been read: float32 [BN].

    Not by the matrix units: a tile goes from the memory to registers, and the next is on its way meanwhile.
    """
    total = tl.zeros((first.shape[0],), dtype=tl.float32)
    w = first
    for d0 in range(0, D, BD):
        x = tl.load(x_ptr + d0 + d, mask=d0 + d < D, other=0.0).to(tl.float32)
        ahead = tl.load(w_rows + (d0 + BD + d)[None, :], mask=mask_n & (d0 + BD + d < D)[None, :], other=0.0)
        total += tl.sum(w.to(tl.float32) * x[None, :], 1)
        w = ahead
    return total


@triton.jit
def _some_rows(
    x_rows, w_rows, d, mask_t, mask_n, first, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """The same for several rows of float32, which the matrix units do not take: float32 [BT, BN]."""
    sums = tl.zeros((BT, BN, BD), dtype=tl.float32)
    w = first
    for d0 in range(0, D, BD):
        x = tl.load(x_rows + (d0 + d)[None, :], mask=mask_t & (d0 + d < D)[None, :], other=0.0)
        ahead = tl.load(w_rows + (d0 + BD + d)[None, :], mask=mask_n & (d0 + BD + d < D)[None, :], other=0.0)
        sums += x[:, None, :] * w[None, :, :]
        w = ahead
    return tl.sum(sums, 2)


@triton.jit
def _some_columns(
    x_ptr, w_ptr, out_ptr, tile, T, N,
    D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    n, d, mask_n, rows = _tile(tile, N, D, BN, BD)
    w_rows = w_ptr + rows
    if BT == 1:
        first = tl.load(w_rows + d[None, :], mask=mask_n & (d < D)[None, :], other=0.0)
        if OVERLAP:
            gdc_wait()
        row = _one_row(x_ptr, w_rows, d, mask_n, first, D, BD)
        if OVERLAP:
            gdc_launch_dependents()
        tl.store(out_ptr + n, row.to(out_ptr.dtype.element_ty), mask=n < N)
    else:
        t = tl.arange(0, BT)
        mask_t = (t < T)[:, None]
        if w_ptr.dtype.element_ty == tl.float32:
            first = tl.load(w_rows + d[None, :], mask=mask_n & (d < D)[None, :], other=0.0)
            if OVERLAP:
                gdc_wait()
            total = _some_rows(x_ptr + t[:, None] * D, w_rows, d, mask_t, mask_n, first, D, BT, BN, BD)
        else:
            if OVERLAP:
                gdc_wait()
            total = tl.zeros((BT, BN), dtype=tl.float32)
            for d0 in range(0, D, BD):
                mask_d = (d0 + d < D)[None, :]
                x = tl.load(x_ptr + t[:, None] * D + (d0 + d)[None, :], mask=mask_t & mask_d, other=0.0)
                w = tl.load(w_rows + (d0 + d)[None, :], mask=mask_n & mask_d, other=0.0)
                total += dot(x, tl.trans(w))
        if OVERLAP:
            gdc_launch_dependents()
        at = out_ptr + t[:, None] * N + n[None, :]
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask_t & (n < N)[None, :])


@triton.jit(do_not_specialize=["T", "N0", "N1", "N2", "N3"])
def joined_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, T, N0, N1, N2, N3,
    MANY: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """x [T, D] times each of MANY weights [Ni, D] transposed, to outs [T, Ni]. Grid (sum of tiles of Ni,), the first
    weight's first; what is not there is given as the first weight and its output, with Ni = 0. ALIGNED: all of them
    begin at a multiple of 16 bytes."""
    tile = tl.program_id(0)
    # One piece of code for the one chosen: Triton 3.9 gives loads of four pieces shared memory of their own each.
    w_ptr = w0_ptr
    out_ptr = out0_ptr
    N = N0
    if MANY > 1 and tile >= tl.cdiv(N, BN):
        tile -= tl.cdiv(N, BN)
        w_ptr = w1_ptr
        out_ptr = out1_ptr
        N = N1
        if MANY > 2 and tile >= tl.cdiv(N, BN):
            tile -= tl.cdiv(N, BN)
            w_ptr = w2_ptr
            out_ptr = out2_ptr
            N = N2
            if MANY > 3 and tile >= tl.cdiv(N, BN):
                tile -= tl.cdiv(N, BN)
                w_ptr = w3_ptr
                out_ptr = out3_ptr
                N = N3
    if ALIGNED:  # which Triton does not see behind the choice
        w_ptr = tl.multiple_of(w_ptr, 16)
        out_ptr = tl.multiple_of(out_ptr, 16)
    _some_columns(x_ptr, w_ptr, out_ptr, tile, T, N, D, BT, BN, BD, OVERLAP)


@triton.jit(do_not_specialize=["T", "N"])
def gated_pair_kernel(
    x_ptr, gate_ptr, up_ptr, out_gate_ptr, out_up_ptr, out_ptr, T, N,
    GELU: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x [T, D] times the weights gate and up [N, D] transposed, to their outs [T, N], and act(gate) * up of those, as
    they were rounded, to out [T, N]. Grid (tiles of N,)."""
    n, d, mask_n, rows = _tile(tl.program_id(0), N, D, BN, BD)
    kind = out_ptr.dtype.element_ty
    if BT == 1:
        mask = mask_n & (d < D)[None, :]
        gate_first = tl.load(gate_ptr + rows + d[None, :], mask=mask, other=0.0)
        up_first = tl.load(up_ptr + rows + d[None, :], mask=mask, other=0.0)
        if OVERLAP:
            gdc_wait()
        gate = _one_row(x_ptr, gate_ptr + rows, d, mask_n, gate_first, D, BD).to(kind)
        up = _one_row(x_ptr, up_ptr + rows, d, mask_n, up_first, D, BD).to(kind)
        at = n
        mask_out = n < N
    else:
        if OVERLAP:
            gdc_wait()
        t = tl.arange(0, BT)
        mask_t = (t < T)[:, None]
        of_gate = tl.zeros((BT, BN), dtype=tl.float32)
        of_up = tl.zeros((BT, BN), dtype=tl.float32)
        for d0 in range(0, D, BD):
            mask_d = (d0 + d < D)[None, :]
            x = tl.load(x_ptr + t[:, None] * D + (d0 + d)[None, :], mask=mask_t & mask_d, other=0.0)
            w = tl.load(gate_ptr + rows + (d0 + d)[None, :], mask=mask_n & mask_d, other=0.0)
            of_gate += dot(x, tl.trans(w))
            w = tl.load(up_ptr + rows + (d0 + d)[None, :], mask=mask_n & mask_d, other=0.0)
            of_up += dot(x, tl.trans(w))
        gate = of_gate.to(kind)
        up = of_up.to(kind)
        at = t[:, None] * N + n[None, :]
        mask_out = mask_t & (n < N)[None, :]
    if OVERLAP:
        gdc_launch_dependents()
    act, _ = activated(gate.to(tl.float32), GELU)
    tl.store(out_gate_ptr + at, gate, mask=mask_out)
    tl.store(out_up_ptr + at, up, mask=mask_out)
    tl.store(out_ptr + at, (act * up.to(tl.float32)).to(kind), mask=mask_out)


products, gated_pair = Launcher(joined_kernel, overlaps=True), Launcher(gated_pair_kernel, overlaps=True)
