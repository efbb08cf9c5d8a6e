"""Kernel of several linear layers of one input with few rows: every program reads some rows of one weight."""

from __future__ import annotations

import triton
import triton.language as tl

from leet_linear_attention.triton.common import dot
from leet_linear_attention.triton.launcher import Launcher


@triton.jit
def _some_columns(
    x_ptr, w_ptr, out_ptr, tile, T, N, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
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
    at = out_ptr + t[:, None] * N + n[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["T", "N0", "N1", "N2", "N3"])
def joined_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, T, N0, N1, N2, N3,
    MANY: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x [T, D] times each of MANY weights [Ni, D] transposed, to outs [T, Ni]. Grid (sum of tiles of Ni,), the first
    weight's first; what is not there is given as the first weight and its output, with Ni = 0."""
    tile = tl.program_id(0)
    end0 = tl.cdiv(N0, BN)
    end1 = end0 + tl.cdiv(N1, BN)
    if tile < end0:
        _some_columns(x_ptr, w0_ptr, out0_ptr, tile, T, N0, D, BT, BN, BD)
    elif tile < end1:
        _some_columns(x_ptr, w1_ptr, out1_ptr, tile - end0, T, N1, D, BT, BN, BD)
    else:
        if MANY > 2:
            end2 = end1 + tl.cdiv(N2, BN)
            if tile < end2:
                _some_columns(x_ptr, w2_ptr, out2_ptr, tile - end1, T, N2, D, BT, BN, BD)
            else:
                if MANY > 3:
                    _some_columns(x_ptr, w3_ptr, out3_ptr, tile - end2, T, N3, D, BT, BN, BD)


products = Launcher(joined_kernel)
