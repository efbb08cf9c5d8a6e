"""Kernel of a linear layer for few rows: the weights stream by once, and their speed is the only one that counts."""

from __future__ import annotations

import triton
import triton.language as tl

from leet_linear_attention.triton.common import dot


@triton.jit(do_not_specialize=["M", "N", "K8"])
def few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N, K8,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] weight [N, K]^T + bias [N]. Grid (tiles of N,), M <= BM. K comes divided by 8: the product
    tells the compiler that loads may be 16 bytes wide."""
    K = K8 * 8
    m = tl.arange(0, BM)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    mask_m = m < M
    mask_n = n < N
    rows = weight_ptr + n[:, None] * K
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in range(0, K, BK):
        mask_k = k0 + k < K
        w = tl.load(rows + (k0 + k)[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        x = tl.load(x_ptr + m[:, None] * K + (k0 + k)[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        total += dot(x, tl.trans(w))
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    at = out_ptr + m[:, None] * N + n[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])
