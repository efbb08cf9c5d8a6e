"""Kernels of linear layers with few rows: several of one input, and a pair with the gated unit that follows it.

Every program reads some rows of one weight, or of both of a pair. Inside `overlapping` it asks for the beginning of its
part before what it waits for has ended: the weights are no result of another launch, and what is asked for into the
L2 cache is seen changed there, if it were.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from leet_linear_attention.triton.common import dot
from leet_linear_attention.triton.launcher import Launcher

from .glu_kernel import activated

THREADS = tl.constexpr(128)  # of a program: 4 warps


@triton.jit
def _ask_for(w_ptr, first, N, D, ahead, BN: tl.constexpr):
    """Ask for the first ``ahead`` entries of rows ``first`` to ``first + BN`` of a weight [N, D] of 16 bits.

    ahead: a multiple of 8 for each of the THREADS / BN threads that share a row.
    """
    EACH: tl.constexpr = THREADS // BN
    thread = tl.arange(0, THREADS)
    row = tl.minimum(first + thread // EACH, N - 1).to(tl.int64)
    place = (w_ptr + row * D + (thread % EACH) * (ahead // EACH)).to(tl.int64)
    size = tl.zeros((THREADS,), dtype=tl.int32) + ahead // EACH * 2
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [place, size], tl.int32, False, 1
    )


@triton.jit
def _some_columns(
    x_ptr, w_ptr, out_ptr, tile, T, N, ahead,
    D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        if ahead > 0:
            _ask_for(w_ptr, tile * BN, N, D, ahead, BN)
        gdc_wait()
    t = tl.arange(0, BT)
    n = tile * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    mask_t = t < T
    mask_n = n < N
    total = tl.zeros((BT, BN), dtype=tl.float32)
    for d0 in range(0, D, BD):
        mask_d = d0 + d < D
        x = tl.load(x_ptr + t[:, None] * D + (d0 + d)[None, :], mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        at = w_ptr + n.to(tl.int64)[:, None] * D + (d0 + d)[None, :]
        w = tl.load(at, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        total += dot(x, tl.trans(w))
    if OVERLAP:
        gdc_launch_dependents()
    at = out_ptr + t[:, None] * N + n[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["T", "N0", "N1", "N2", "N3", "ahead"])
def joined_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, T, N0, N1, N2, N3, ahead,
    MANY: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x [T, D] times each of MANY weights [Ni, D] transposed, to outs [T, Ni]. Grid (sum of tiles of Ni,), the first
    weight's first; what is not there is given as the first weight and its output, with Ni = 0."""
    tile = tl.program_id(0)
    end0 = tl.cdiv(N0, BN)
    end1 = end0 + tl.cdiv(N1, BN)
    end2 = end1 + tl.cdiv(N2, BN)
    if MANY == 1 or tile < end0:
        _some_columns(x_ptr, w0_ptr, out0_ptr, tile, T, N0, ahead, D, BT, BN, BD, OVERLAP)
    else:
        if MANY == 2 or tile < end1:
            _some_columns(x_ptr, w1_ptr, out1_ptr, tile - end0, T, N1, ahead, D, BT, BN, BD, OVERLAP)
        else:
            if MANY == 3 or tile < end2:
                _some_columns(x_ptr, w2_ptr, out2_ptr, tile - end1, T, N2, ahead, D, BT, BN, BD, OVERLAP)
            else:
                _some_columns(x_ptr, w3_ptr, out3_ptr, tile - end2, T, N3, ahead, D, BT, BN, BD, OVERLAP)


@triton.jit(do_not_specialize=["T", "N", "ahead"])
def gated_pair_kernel(
    x_ptr, gate_ptr, up_ptr, out_gate_ptr, out_up_ptr, out_ptr, T, N, ahead,
    GELU: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """x [T, D] times the weights gate and up [N, D] transposed, to their outs [T, N], and act(gate) * up of those, as
    they were rounded, to out [T, N]. Grid (tiles of N,)."""
    first = tl.program_id(0) * BN
    if OVERLAP:
        if ahead > 0:
            _ask_for(gate_ptr, first, N, D, ahead, BN)
            _ask_for(up_ptr, first, N, D, ahead, BN)
        gdc_wait()
    t = tl.arange(0, BT)
    n = first + tl.arange(0, BN)
    d = tl.arange(0, BD)
    mask_t = t < T
    mask_n = n < N
    rows = n.to(tl.int64)[:, None] * D
    gate = tl.zeros((BT, BN), dtype=tl.float32)
    up = tl.zeros((BT, BN), dtype=tl.float32)
    for d0 in range(0, D, BD):
        mask_d = d0 + d < D
        mask = mask_n[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + t[:, None] * D + (d0 + d)[None, :], mask=mask_t[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(gate_ptr + rows + (d0 + d)[None, :], mask=mask, other=0.0)
        gate += dot(x, tl.trans(w))
        w = tl.load(up_ptr + rows + (d0 + d)[None, :], mask=mask, other=0.0)
        up += dot(x, tl.trans(w))
    if OVERLAP:
        gdc_launch_dependents()
    kind = out_ptr.dtype.element_ty
    gate = gate.to(kind)
    up = up.to(kind)
    act, _ = activated(gate.to(tl.float32), GELU)
    at = t[:, None] * N + n[None, :]
    mask = mask_t[:, None] & mask_n[None, :]
    tl.store(out_gate_ptr + at, gate, mask=mask)
    tl.store(out_up_ptr + at, up, mask=mask)
    tl.store(out_ptr + at, (act * up.to(tl.float32)).to(kind), mask=mask)


products, gated_pair = Launcher(joined_kernel, overlaps=True), Launcher(gated_pair_kernel, overlaps=True)
