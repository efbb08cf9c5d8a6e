"""A pass over time with 256 rows of the state: it stays in registers, the scores come from a kernel of their own.

The recurrence, the roles of a, b, c and both directions of time are those of ``sweep``. There a program of 256 rows
waits: the state passes through shared memory on its way into a product, the scores of a chunk are computed by every
tile of columns again, and too little shared memory is left to have the next chunks on their way. Here

* the scores of every chunk are computed once, by ``scores_kernel``, and read as a fourth tensor;
* a program holds the state as [columns, rows]: as the first operand of its product with the rows it comes from
  registers, and four warps can hold it;
* chunks of 32 tokens leave room for three stages of loads.

In bfloat16, with no decay or one per head, and rows of the batch: packed sequences stay with ``sweep``, as the grid of
the scores would need the longest sequence for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, token_of


@triton.jit(
    do_not_specialize=[
        "n_chunks", "T", "H", "group_a", "group_b", "group_g", "sab", "sat", "sah", "sbb", "sbt", "sbh",
    ]
)  # fmt: skip
def scores_kernel(
    a_ptr, b_ptr, g_ptr, scores_ptr,
    n_chunks, T, H, group_a, group_b, group_g, scale, sab, sat, sah, sbb, sbt, sbh,
    X: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, DECAY: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """-scale * D_ij (a_i . b_j) for the tokens j <= i of each chunk, else 0: [parts, B, H, chunks, C, C].

    Grid (B * H * chunks, parts of X). A pass backward in time takes a and b in each other's place, and the scores
    transposed. The sign is the other one as the reader takes a difference.
    """
    i_c = tl.program_id(0) % n_chunks
    i_nh = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H
    t0 = (i_c * C).to(tl.int64)

    # Strides come divided by ALIGN: the product tells the compiler that loads may be 16 bytes wide.
    sat *= ALIGN
    sbt *= ALIGN
    a_ptr = token_of(a_ptr, i_n, t0, i_h, group_a, sab, sat, sah, ALIGN)
    b_ptr = token_of(b_ptr, i_n, t0, i_h, group_b, sbb, sbt, sbh, ALIGN)
    r = tl.arange(0, C)
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    mask = (r < T - t0)[:, None] & (x < X)[None, :]
    a = tl.load(a_ptr + (r[:, None] * sat + x[None, :]), mask=mask, other=0.0)
    b = tl.load(b_ptr + (r[:, None] * sbt + x[None, :]), mask=mask, other=0.0)

    lag = r[:, None] - r[None, :]
    causal = lag >= 0
    A = dot(a, tl.trans(b)) * -scale
    if DECAY == 1:
        g_head = tl.load(g_ptr + i_h // group_g)
        A *= tl.exp(g_head * tl.where(causal, lag, 0).to(tl.float32))
    A = tl.where(causal, A, 0.0)
    i_chunk = tl.program_id(1) * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    tl.store(scores_ptr + i_chunk * (C * C) + (r[:, None] * C + r[None, :]), A.to(scores_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "T", "rows", "segment", "n_segments", "H", "group_a", "group_b", "group_c", "group_g",
        "sab", "sat", "sah", "sbb", "sbt", "sbh", "scb", "sct", "sch", "ssx", "ssy",
    ]
)  # fmt: skip
def wide_kernel(
    a_ptr, b_ptr, c_ptr, g_ptr, scores_ptr, out_ptr, s_in_ptr, s_out_ptr,
    T, rows, segment, n_segments, H, group_a, group_b, group_c, group_g, scale,
    sab, sat, sah, sbb, sbt, sbh, scb, sct, sch, ssx, ssy,
    X: tl.constexpr, Y: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, ALIGN: tl.constexpr, HAS_S_IN: tl.constexpr, HAS_S_OUT: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * segments * tiles of the state,), tiles fastest; arguments and results as ``sweep_kernel``'s.

    scores: those of ``scores_kernel`` for these a and b, each later token's in a row.
    """
    TILES_X: tl.constexpr = (X + BX - 1) // BX
    TILES: tl.constexpr = ((Y + BY - 1) // BY) * TILES_X
    i_tile = tl.program_id(0) % TILES
    i_x = i_tile % TILES_X
    i_y = i_tile // TILES_X
    i_s = (tl.program_id(0) // TILES) % n_segments
    i_nh = (tl.program_id(0) // TILES // n_segments).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H
    begin = i_s * segment
    end = tl.minimum(begin + segment, T)
    n_chunks = tl.cdiv(tl.maximum(end - begin, 0), C)

    # Strides come divided by ALIGN: the product tells the compiler that loads may be 16 bytes wide.
    sat *= ALIGN
    sbt *= ALIGN
    sct *= ALIGN
    a_ptr = token_of(a_ptr, i_n, 0, i_h, group_a, sab, sat, sah, ALIGN)
    b_ptr = token_of(b_ptr, i_n, 0, i_h, group_b, sbb, sbt, sbh, ALIGN)
    c_ptr = token_of(c_ptr, i_n, 0, i_h, group_c, scb, sct, sch, ALIGN)
    out_ptr += (i_x.to(tl.int64) * rows * H + i_n * T * H + i_h) * Y
    i_first = (i_x * (tl.num_programs(0) // TILES // n_segments) + i_nh) * tl.cdiv(T, C)  # chunk of the sequence
    scores_ptr += i_first * (C * C)

    # The state in two halves of its rows: the 16-bit copy of one at a time is all that fits beside them.
    HX: tl.constexpr = BX // 2
    r = tl.arange(0, C)
    x = i_x * BX + tl.arange(0, HX)
    y = i_y * BY + tl.arange(0, BY)
    o_state = x[None, :] * ssx + y[:, None] * ssy
    i_state = (i_nh * n_segments + i_s) * X * Y
    mask_0 = (x < X)[None, :] & (y < Y)[:, None]
    mask_1 = (x < X - HX)[None, :] & (y < Y)[:, None]

    S_0 = tl.zeros((BY, HX), dtype=tl.float32)
    S_1 = tl.zeros((BY, HX), dtype=tl.float32)
    if HAS_S_IN:
        s_in_ptr += i_state
        S_0 += tl.load(s_in_ptr + o_state, mask=mask_0, other=0.0)
        S_1 += tl.load(s_in_ptr + HX * ssx + o_state, mask=mask_1, other=0.0)
    if DECAY == 1:
        g_head = tl.load(g_ptr + i_h // group_g)
        from_start = tl.exp(g_head * (r + 1).to(tl.float32))

    for i in range(0, n_chunks):
        i_c = (n_chunks - 1 - i) if REVERSE else i
        t0 = (begin + i_c * C).to(tl.int64)
        n_valid = tl.minimum(end - begin - i_c * C, C)
        mask_t = r < n_valid

        # Masks that are always true would cost registers, of which the state leaves few.
        tile_0 = (mask_t[:, None] & (x < X)[None, :]) if X % BX != 0 else mask_t[:, None]
        tile_1 = (mask_t[:, None] & (x < X - HX)[None, :]) if X % BX != 0 else mask_t[:, None]
        tile_y = (mask_t[:, None] & (y < Y)[None, :]) if Y % BY != 0 else mask_t[:, None]
        o_a = t0 * sat + (r[:, None] * sat + x[None, :])
        o_b = t0 * sbt + (r[:, None] * sbt + x[None, :])
        c = tl.load(c_ptr + t0 * sct + (r[:, None] * sct + y[None, :]), mask=tile_y, other=0.0)
        a_0 = tl.load(a_ptr + o_a, mask=tile_0, other=0.0)
        a_1 = tl.load(a_ptr + HX + o_a, mask=tile_1, other=0.0)
        b_0 = tl.load(b_ptr + o_b, mask=tile_0, other=0.0)
        b_1 = tl.load(b_ptr + HX + o_b, mask=tile_1, other=0.0)
        scores = tl.load(scores_ptr + t0 * C + (r[:, None] * C + r[None, :]))

        # First, and kept apart until the end: as it needs no state, the state's own products of the chunk before may
        # still be on their way when it begins.
        within = dot(tl.trans(c), scores if REVERSE else tl.trans(scores))
        o = dot(S_0.to(c.dtype), tl.trans(a_0))
        o += dot(S_1.to(c.dtype), tl.trans(a_1))
        if DECAY == 1:
            to_last = tl.exp(g_head * tl.maximum(n_valid - 1 - r, 0).to(tl.float32))
            to_row = to_last if REVERSE else from_start
            o *= (to_row * scale)[None, :]
        else:
            o *= scale
        o -= within
        tl.store(
            out_ptr + t0 * H * Y + (r[:, None] * (H * Y) + y[None, :]),
            tl.trans(o).to(out_ptr.dtype.element_ty),
            mask=tile_y,
        )

        added = c
        if DECAY == 1:
            to_end = from_start if REVERSE else to_last
            added = (c * to_end[:, None]).to(c.dtype)
            kept = tl.exp(g_head * n_valid)
            S_0 *= kept
            S_1 *= kept
        S_0 += dot(tl.trans(added), b_0)
        S_1 += dot(tl.trans(added), b_1)

    if HAS_S_OUT:
        s_out_ptr += i_state
        tl.store(s_out_ptr + o_state, S_0, mask=mask_0)
        tl.store(s_out_ptr + HX * ssx + o_state, S_1, mask=mask_1)
