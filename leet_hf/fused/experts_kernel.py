"""Kernels of experts for few tokens: all tokens against one expert's rows, and nothing of experts no token chose."""

from __future__ import annotations

import triton
import triton.language as tl

from leet_linear_attention.triton.common import dot, wait_for_inputs
from leet_linear_attention.triton.launcher import Launcher


@triton.jit(do_not_specialize=["T"])
def up_kernel(
    x_ptr, index_ptr, weight_ptr, out_ptr, T,
    D: tl.constexpr, I: tl.constexpr, TOP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up. Grid (experts * tiles of I,). x [T, D], index [T, TOP], weight [E, 2 I, D]
    with the gate's rows first; out [T, TOP, I]."""
    TILES: tl.constexpr = (I + BI - 1) // BI
    expert = (tl.program_id(0) // TILES).to(tl.int64)
    t = tl.arange(0, BT)
    mask_t = t < T
    wait_for_inputs(OVERLAP)
    hits = tl.zeros((BT,), dtype=tl.int32)
    for j in tl.static_range(TOP):
        hits += (tl.load(index_ptr + t * TOP + j, mask=mask_t, other=-1) == expert).to(tl.int32)
    if tl.sum(hits, 0) > 0:
        first = (tl.program_id(0) % TILES) * BI
        i = first + tl.arange(0, BI)
        mask_i = i < I
        # Rows of gate and up in turns: one product for both.
        r = tl.arange(0, 2 * BI)
        mask_r = first + r // 2 < I
        rows = weight_ptr + expert * (2 * I * D) + ((r % 2) * I + first + r // 2)[:, None] * D
        d = tl.arange(0, BD)
        both = tl.zeros((BT, 2 * BI), dtype=tl.float32)
        for d0 in range(0, D, BD):
            mask_d = d0 + d < D
            x = tl.load(x_ptr + t[:, None] * D + (d0 + d)[None, :], mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            w = tl.load(rows + (d0 + d)[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0)
            both += dot(x, tl.trans(w))
        gate, up = tl.split(tl.reshape(both, (BT, BI, 2)))
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
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sum over a token's experts of share * down(inner). Grid (tiles of D,). inner [T, TOP, I]; index and share
    [T, TOP]; weight [E, D, I]; out [T, D]."""
    t = tl.arange(0, BT)
    mask_t = t < T
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d = d < D
    i = tl.arange(0, BI)
    kind = out_ptr.dtype.element_ty
    wait_for_inputs(OVERLAP)
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


up, down = Launcher(up_kernel, overlaps=True), Launcher(down_kernel, overlaps=True)
