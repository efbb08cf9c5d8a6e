"""One kernel for every pass over time: a state in registers, chunk after chunk, in either direction of time.

With rows ``a``, keys ``b`` and values ``c`` the sweep computes, for tokens i and j of one sequence and head,

    out_i = scale * ( sum_j D_ij (a_i . b_j) c_j  +  decay to the token * a_i^T S )
    S     = (decay over the chunk) * S  +  sum_j (decay to the chunk's end) * b_j c_j^T

Forward in time (j <= i) that is the operator itself, (a, b, c) = (q, k, v), and the gradient of q, (do, v, k). Backward
in time (j >= i) it is the gradient of v, (k, q, do), and of k, (v, do, q). Every pass therefore reads three tensors and
writes one; no state goes to memory unless it is asked for. (Most passes with 256 rows of the state are ``wide``'s.)
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .common import decayed, dot, dot_scaled, factors, narrow_dot, token_of
from .decay_gradient import chunk_terms

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def power(g, DECAY: tl.constexpr):
    """The factor of a summed log_decay: to base 2 where there is one a token."""
    if DECAY == 2:
        return tl.exp2(g.to(tl.float32))
    else:
        return tl.exp(g.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "T", "rows", "segment", "n_segments", "skip", "H",
        "group_a", "group_b", "group_c", "group_d", "group_g",
        "sab", "sat", "sah", "sbb", "sbt", "sbh", "scb", "sct", "sch", "sdb", "sdt", "sdh", "sgb", "sgt", "sgh",
        "ssx", "ssy", "beside",
    ]
)  # fmt: skip
def sweep_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, g_ptr, out_ptr, s_in_ptr, s_out_ptr, g_sum_ptr, chunks_ptr, near_ptr, far_ptr,
    terms_ptr, cu_ptr,
    T, rows, segment, n_segments, skip, H, group_a, group_b, group_c, group_d, group_g, scale,
    sab, sat, sah, sbb, sbt, sbh, scb, sct, sch, sdb, sdt, sdh, sgb, sgt, sgh, ssx, ssy, beside,
    X: tl.constexpr, Y: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, ALIGN: tl.constexpr, APART: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_S_IN: tl.constexpr, HAS_S_OUT: tl.constexpr, HAS_CHUNKS: tl.constexpr,
    LENT: tl.constexpr, HAS_TERMS: tl.constexpr, SEGMENTED: tl.constexpr, IS_FP32: tl.constexpr,
    IS_FP16: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * H * (segments - ``skip``) * tiles of the state,), tiles fastest.

    ``X`` is the width of a and b, ``Y`` of c and out; S is [X, Y] and a program holds a [BX, BY] tile of it. Where X
    takes several tiles, each gives a part of every output, [parts, B, T, H, Y]. ``rows`` is B * T. ``skip`` leaves out
    as many segments at the end of the pass. APART: what comes of the state and what comes of the chunk are kept apart
    until the end.

    HAS_CHUNKS writes the state that meets each chunk, [slots, H, X, Y]. HAS_TERMS reads those of the opposite pass and,
    with d (as wide as c), writes the terms of the gradient of log_decay, [2, tiles, B, T, H] (see ``decay_gradient``).
    LENT: see ``operands.ChunkStates``; out may be ``near``: as an operand of a product the state of a chunk has gone
    through shared memory, and all threads past a barrier, when the chunk's outputs are written there.

    OVERLAP: the launch behind this one may begin while this one runs. beside: 1 if this one has nothing to do with the
    launch in front of it and need not wait for its end, only end no sooner.
    """
    if OVERLAP:
        gdc_launch_dependents()
        if beside == 0:
            gdc_wait()
    TILES_X: tl.constexpr = (X + BX - 1) // BX
    TILES: tl.constexpr = ((Y + BY - 1) // BY) * TILES_X
    i_tile = tl.program_id(0) % TILES
    i_x = i_tile % TILES_X
    i_y = i_tile // TILES_X
    i_s = (tl.program_id(0) // TILES) % (n_segments - skip)
    if REVERSE:
        i_s += skip
    i_nh = (tl.program_id(0) // TILES // (n_segments - skip)).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H

    if PACKED:
        bos = tl.load(cu_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_ptr + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        i_b = bos * 0
    else:
        bos = i_n * 0
        length = T
        i_b = i_n
    begin = i_s * segment
    end = tl.minimum(begin + segment, length)
    n_chunks = tl.cdiv(tl.maximum(end - begin, 0), C)

    # Strides come divided by ALIGN: the product tells the compiler that loads may be 16 bytes wide.
    sat *= ALIGN
    sbt *= ALIGN
    sct *= ALIGN
    sdt *= ALIGN
    a_ptr = token_of(a_ptr, i_b, bos, i_h, group_a, sab, sat, sah, ALIGN)
    b_ptr = token_of(b_ptr, i_b, bos, i_h, group_b, sbb, sbt, sbh, ALIGN)
    c_ptr = token_of(c_ptr, i_b, bos, i_h, group_c, scb, sct, sch, ALIGN)
    row = (i_b * T + bos) * H + i_h  # of out, [B, T, H, Y] contiguous
    if HAS_OUT:
        out_ptr += (i_x.to(tl.int64) * rows * H + row) * Y
    if HAS_TERMS:
        d_ptr = token_of(d_ptr, i_b, bos, i_h, group_d, sdb, sdt, sdh, ALIGN)
        terms_ptr += i_tile.to(tl.int64) * rows * H + row
    if DECAY == 2:
        g_ptr += i_b * sgb + bos * sgt + (i_h // group_g) * sgh

    r = tl.arange(0, C)
    x = i_x * BX + tl.arange(0, BX)
    y = i_y * BY + tl.arange(0, BY)
    mask_x = x < X
    mask_y = y < Y
    o_state = x[:, None] * ssx + y[None, :] * ssy
    o_chunk = x[:, None] * Y + y[None, :]
    mask_state = mask_x[:, None] & mask_y[None, :]
    i_state = (i_nh * n_segments + i_s) * X * Y

    S = tl.zeros((BX, BY), dtype=tl.float32)
    if HAS_S_IN:
        S += tl.load(s_in_ptr + i_state + o_state, mask=mask_state, other=0.0)
    # float16: the state is ``held`` times S, so that scaling decayed values changes but the factor of the decay.
    held = tl.full((), 1.0, dtype=tl.float32)
    g_total = tl.zeros((), dtype=tl.float64)
    first = n_chunks * 0

    lag = (r[None, :] - r[:, None]) if REVERSE else (r[:, None] - r[None, :])
    causal = lag >= 0
    if DECAY == 1:
        # one decay per head: the same matrix for every chunk
        g_head = tl.load(g_ptr + i_h // group_g)
        D = tl.where(causal, tl.exp(g_head * tl.where(causal, lag, 0).to(tl.float32)), 0.0)
        from_start = tl.exp(g_head * (r + 1).to(tl.float32))
        g_total += g_head.to(tl.float64) * tl.maximum(end - begin, 0)
        if SEGMENTED:
            # exp(-200) takes every float32 to 0: only what is nearer to the segment's end is read
            far = tl.minimum(200.0 / (C * tl.maximum(-g_head, 1e-9)), 1e9)
            first = tl.maximum(n_chunks - 2 - far.to(tl.int32), 0)
    if DECAY == 2:
        # The decays of a chunk are loaded a chunk ahead: nothing else hides the way to memory.
        t0 = (begin + ((n_chunks - 1) * C if REVERSE else 0)).to(tl.int64)
        g_next = tl.load(g_ptr + (t0 + r) * sgt, mask=r < tl.where(n_chunks > 0, end - t0, 0), other=0.0)

    for i in range(first, n_chunks):
        i_c = (n_chunks - 1 - i) if REVERSE else i
        t0 = (begin + i_c * C).to(tl.int64)
        n_valid = tl.minimum(end - begin - i_c * C, C)
        mask_t = r < n_valid

        tile_x = mask_t[:, None] & mask_x[None, :]
        tile_y = mask_t[:, None] & mask_y[None, :]
        b = tl.load(b_ptr + t0 * sbt + (r[:, None] * sbt + x[None, :]), mask=tile_x, other=0.0)
        c = tl.load(c_ptr + t0 * sct + (r[:, None] * sct + y[None, :]), mask=tile_y, other=0.0)

        if DECAY == 1:
            to_last = tl.exp(g_head * tl.maximum(n_valid - 1 - r, 0).to(tl.float32))
            to_row = to_last if REVERSE else from_start
            to_end = from_start if REVERSE else to_last
            g_chunk = (g_head.to(tl.float64) if IS_FP32 else g_head) * n_valid
        if DECAY == 2:
            # float32 sums of strong decays lose about 1e-4, which float32 results would show. To base 2, as the
            # device's exponential is.
            g = (g_next.to(tl.float64) if IS_FP32 else g_next) * LOG2_E
            G = tl.cumsum(g, 0)
            g_chunk = tl.sum(g, 0)
            to_row = tl.exp2(((g_chunk - G) if REVERSE else G).to(tl.float32))
            to_end = tl.exp2((G if REVERSE else (g_chunk - G)).to(tl.float32))
            t1 = t0 - C if REVERSE else t0 + C
            g_next = tl.load(g_ptr + (t1 + r) * sgt, mask=r < tl.where(i + 1 < n_chunks, end - t1, 0), other=0.0)

        if HAS_CHUNKS or HAS_TERMS:
            if LENT:
                # Short chunks keep theirs as one tile: rows of Y behind one another.
                whole = n_valid == C
                short = chunks_ptr + i_nh * X * Y
                stride = tl.where(whole, H, 1) * Y
                at = tl.where(whole, near_ptr + (row + t0 * H) * Y, short)
                at_row = at + (x % C) * stride
                if X > C:
                    stride = tl.where(whole, H * X, Y)
                    at = tl.where(whole, far_ptr + (row + t0 * H) * X, short + C * Y)
                    at_row = tl.where(x < C, at_row, at + (x % C) * stride)
                if X % 8 == 0 and Y % 8 == 0:
                    at_row = tl.multiple_of(at_row, 16)  # bytes, which Triton 3.9 does not see behind the choice
                at_chunk = at_row[:, None] + y[None, :]
            else:
                i_first = (bos // C + i_n) if PACKED else i_n * tl.cdiv(T, C)
                at_chunk = chunks_ptr + ((i_first + (begin // C) + i_c) * H + i_h) * X * Y + o_chunk
        if HAS_CHUNKS:
            state = S * held if IS_FP16 else S
            tl.store(at_chunk, state.to(chunks_ptr.dtype.element_ty), mask=mask_state)

        if HAS_OUT:
            a = tl.load(a_ptr + t0 * sat + (r[:, None] * sat + x[None, :]), mask=tile_x, other=0.0)
            A = dot(a, tl.trans(b))
            if DECAY == 2:
                log_d = (G[None, :] - G[:, None]) if REVERSE else (G[:, None] - G[None, :])
                A *= tl.exp2(tl.where(causal, log_d.to(tl.float32), float("-inf")))
            elif DECAY == 1:
                A *= D
            else:
                A = tl.where(causal, A, 0.0)
            by = to_row if DECAY != 0 else tl.full((C,), 1.0, dtype=tl.float32)
            if IS_FP16:
                o, down = dot_scaled(a, S)
                by *= down * held
            else:
                o = dot(a, S.to(a.dtype))
            if HAS_TERMS or not IS_FP16:
                if IS_FP16 or DECAY != 0:
                    o *= by[:, None]
                by = tl.full((C,), 1.0, dtype=tl.float32)
            if HAS_TERMS:
                d = tl.load(d_ptr + t0 * sdt + (r[:, None] * sdt + y[None, :]), mask=tile_y, other=0.0)
                before = tl.load(at_chunk, mask=mask_state, other=0.0)
                to_query = from_start if DECAY == 1 else tl.exp2(G.to(tl.float32))
                over_chunk = power(g_chunk, DECAY) * held
                passing, ending = chunk_terms(A, b, c, d, o, S, before, to_query, over_chunk, n_valid - 1, C, IS_FP16)
                tl.store(terms_ptr + (t0 + r) * H, passing, mask=mask_t)
                tl.store(terms_ptr + TILES * rows.to(tl.int64) * H + (t0 + r) * H, ending, mask=mask_t)
            to_out = tl.full((C,), 1.0, dtype=tl.float32) * scale
            if IS_FP16:
                # A factor for each row, whose largest entry is found within a warp. The least product of two entries is
                # 2^-48; the part of the state must not overflow by it.
                up, down = factors(tl.max(tl.abs(A), 1), -48, 0)
                A *= up[:, None]
                o *= (by * up)[:, None]
                to_out *= down
            if APART:
                # As a difference: a sum would become one accumulator, whose layout leaves half of eight warps idle.
                o = o - narrow_dot(-A, c, False)
            else:
                o += narrow_dot(A, c, False)
            tl.store(
                out_ptr + t0 * H * Y + (r[:, None] * (H * Y) + y[None, :]),
                (o * to_out[:, None]).to(out_ptr.dtype.element_ty),
                mask=tile_y,
            )

        if DECAY != 0:
            added = c * to_end[:, None]
            if IS_FP16:
                # The decay over the chunk is at most that of any token, and float16's least entry is 2^-24: by this
                # bound the state does not overflow where ``added`` is nothing.
                kept = power(g_chunk, DECAY)
                up, down = factors(tl.maximum(tl.max(tl.abs(added), None), kept * (0.5**24)), -100, 8)
                S *= kept * (held * up)
                added *= up
                held = down
            else:
                S = decayed(S, g_chunk * (LN_2 if DECAY == 2 else 1.0)) if IS_FP32 else S * power(g_chunk, DECAY)
            if DECAY == 2:
                g_total += g_chunk.to(tl.float64) * LN_2
            S += dot(tl.trans(b), added.to(b.dtype))
        else:
            S += dot(tl.trans(b), c)

    if HAS_S_OUT:
        tl.store(s_out_ptr + i_state + o_state, S * held if IS_FP16 else S, mask=mask_state)
    if SEGMENTED and i_tile == 0:
        tl.store(g_sum_ptr + i_nh * n_segments + i_s, g_total)
    if OVERLAP:
        gdc_wait()  # whoever waits for this launch waits for all in front of it


@triton.jit(do_not_specialize=["n_segments", "XY"])
def scan_kernel(
    states_ptr, g_sum_ptr, s_in_ptr, s_out_ptr, n_segments, XY,
    REVERSE: tl.constexpr, HAS_S_IN: tl.constexpr, HAS_S_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the segments' own end states into the states segments start from, in place. Grid (sequences * H, blocks).

    Without HAS_S_OUT the end state of the last segment of the pass is not read.
    """
    i_nh = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = e < XY
    S = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_S_IN:
        S += tl.load(s_in_ptr + i_nh * XY + e, mask=mask, other=0.0)
    for i in range(0, n_segments):
        i_s = (n_segments - 1 - i) if REVERSE else i
        at = states_ptr + (i_nh * n_segments + i_s) * XY + e
        if HAS_S_OUT or i + 1 < n_segments:
            own = tl.load(at, mask=mask, other=0.0)
            g = tl.load(g_sum_ptr + i_nh * n_segments + i_s)
            tl.store(at, S, mask=mask)
            S = decayed(S, g) + own
        else:
            tl.store(at, S, mask=mask)
    if HAS_S_OUT:
        tl.store(s_out_ptr + i_nh * XY + e, S, mask=mask)
