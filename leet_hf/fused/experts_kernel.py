"""Kernels of experts for few tokens: all tokens against one expert's rows, and nothing of experts no token chose."""

from __future__ import annotations

import triton
import triton.language as tl

from leet_linear_attention.triton.common import dot


@triton.jit(do_not_specialize=["T", "row"])
def up_kernel(
    x_ptr, index_ptr, weight_ptr, out_ptr, T, row,
    D: tl.constexpr, I: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up. Grid (experts * tiles of I,). x [T, D] (``row`` apart), index [T, TOP], weight [E, 2 I, D]
    with the gate's rows first; out [T, TOP, I]."""
    TILES: tl.constexpr = (I + BI - 1) // BI
    expert = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.arange(0, BT)
    mask_t = t < T
    hits = tl.zeros((BT,), dtype=tl.int32)
    for j in tl.static_range(TOP):
        hits += (tl.load(index_ptr + t * TOP + j, mask=mask_t, other=-1) == expert).to(tl.int32)
    if tl.sum(hits, 0) > 0:
        i = (tl.program_id(0) % TILES) * BI + tl.arange(0, BI)
        mask_i = i < I
        d = tl.arange(0, BD)
        weight_ptr += expert * (2 * I * D)
        gate = tl.zeros((BT, BI), dtype=tl.float32)
        up = tl.zeros((BT, BI), dtype=tl.float32)
        for d0 in range(0, D, BD):
            mask_d = d0 + d < D
            x = tl.load(x_ptr + t[:, None] * row + (d0 + d)[None, :], mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            at = weight_ptr + i[:, None] * D + (d0 + d)[None, :]
            mask = mask_i[:, None] & mask_d[None, :]
            gate += dot(x, tl.trans(tl.load(at, mask=mask, other=0.0)))
            up += dot(x, tl.trans(tl.load(at + I * D, mask=mask, other=0.0)))
        # rounded where the host's products and activation are
        kind = out_ptr.dtype.element_ty
        gate = gate.to(kind).to(tl.float32)
        inner = (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)
        for j in tl.static_range(TOP):
            here = tl.load(index_ptr + t * TOP + j, mask=mask_t, other=-1) == expert
            at = out_ptr + ((t * TOP + j) * I)[:, None] + i[None, :]
            tl.store(at, inner.to(kind), mask=here[:, None] & mask_i[None, :])


@triton.jit(do_not_specialize=["T", "E"])
def down_kernel(
    inner_ptr, index_ptr, share_ptr, weight_ptr, out_ptr, T, E,
    D: tl.constexpr, I: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The sum over a token's experts of share * down(inner). Grid (tiles of D,). inner [T, TOP, I]; index and share
    [T, TOP]; weight [E, D, I]; out [T, D]."""
    t = tl.arange(0, BT)
    mask_t = t < T
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d = d < D
    i = tl.arange(0, BI)
    kind = out_ptr.dtype.element_ty
    total = tl.zeros((BT, BD), dtype=tl.float32)
    for expert in range(0, E):
        hits = tl.zeros((BT,), dtype=tl.int32)
        place = tl.zeros((BT,), dtype=tl.int32)
        share = tl.zeros((BT,), dtype=tl.float32)
        for j in tl.static_range(TOP):
            here = tl.load(index_ptr + t * TOP + j, mask=mask_t, other=-1) == expert
            own = tl.load(share_ptr + t * TOP + j, mask=mask_t, other=0.0).to(tl.float32)
            hits += here.to(tl.int32)
            place += tl.where(here, j, 0)
            share += tl.where(here, own, 0.0)
        if tl.sum(hits, 0) > 0:
            rows = inner_ptr + ((t * TOP + place) * I)[:, None]
            at = weight_ptr + (tl.zeros((), tl.int64) + expert) * (D * I) + d[:, None] * I
            product = tl.zeros((BT, BD), dtype=tl.float32)
            for i0 in range(0, I, BI):
                mask_i = i0 + i < I
                h = tl.load(rows + (i0 + i)[None, :], mask=(hits > 0)[:, None] & mask_i[None, :], other=0.0)
                w = tl.load(at + (i0 + i)[None, :], mask=mask_d[:, None] & mask_i[None, :], other=0.0)
                product += dot(h, tl.trans(w))
            total += product.to(kind).to(tl.float32) * share[:, None]
    tl.store(out_ptr + t[:, None] * D + d[None, :], total.to(kind), mask=mask_t[:, None] & mask_d[None, :])
