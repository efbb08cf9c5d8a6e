"""What the kernels of the decode step share: a head's part of the ring of buffered tokens, the cursor, and their loop.

The ring has R = 2 N slots: keys [B, R, Hk, K], values [B, R, Hv, V], decays [B, R, H]. The cursor is (start, count,
ticket).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tuning
from .common import decayed, dot, dot_narrow, factors, narrow_dot

MOST_AT_ONCE = tl.constexpr(tuning.MOST_AT_ONCE)


@triton.jit
def wide_sum(g, PRECISE: tl.constexpr):
    """Running sum and total of log_decays, in float64 where PRECISE."""
    if PRECISE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def tiles_of_program(tiles, V: tl.constexpr, BV: tl.constexpr):
    """(i_bh, first, behind): which head a program of a step's grid works on, and the tiles of BV columns of it."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    blocks = tl.cdiv(TILES, tiles)
    first = (tl.program_id(0) % blocks) * tiles
    behind = tl.minimum(first + tiles, TILES)
    return (tl.program_id(0) // blocks).to(tl.int64), first, behind


@triton.jit
def part_of_head(
    base_ptr, keys_ptr, values_ptr, decays_ptr, i_bh, H, group_k, group_v,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """(base, keys, values, decays, stride_k, stride_v): where a head's begin, and how far apart slots lie."""
    i_b = i_bh // H
    i_h = i_bh % H
    heads_k = H // group_k
    heads_v = H // group_v
    base_ptr += i_bh * K * V
    keys_ptr += (i_b * R * heads_k + i_h // group_k) * K
    values_ptr += (i_b * R * heads_v + i_h // group_v) * V
    decays_ptr += i_b * R * H + i_h
    return base_ptr, keys_ptr, values_ptr, decays_ptr, heads_k * K, heads_v * V


@triton.jit
def first_tile(base_ptr, key, mask_k, first, V: tl.constexpr, BV: tl.constexpr):
    """(base_rows, S): where rows of a head's state begin, [K, 1], and the state [K, BV] of a program's first tile.

    It takes longest, so it is read before all that waits for the cursor.
    """
    base_rows = base_ptr + key[:, None] * V
    value = first * BV + tl.arange(0, BV)
    return base_rows, tl.load(base_rows + value[None, :], mask=mask_k[:, None] & (value < V)[None, :], other=0.0)


@triton.jit
def buffered_tokens(
    keys_ptr, decays_ptr, start, count, key, mask_k, stride_k, stride_g, BN: tl.constexpr, R: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Of the ``count`` buffered tokens, oldest first: (slots, which there are, keys [N, K], log_decays, their sums)."""
    n = tl.arange(0, BN)
    slot = (start + n) % R
    held = n < count
    tile_k = held[:, None] & mask_k[None, :]
    kb = tl.load(keys_ptr + (slot * stride_k)[:, None] + key[None, :], mask=tile_k, other=0.0)
    gb = tl.load(decays_ptr + slot * stride_g, mask=held, other=0.0)
    Gb, Gb_all = wide_sum(gb, PRECISE)
    return slot, held, kb, gb, Gb, Gb_all


@triton.jit
def number_folded(count, T, keep, N: tl.constexpr):
    """How many of ``count`` buffered tokens, the oldest, are folded as T new ones find no room."""
    folded = count * 0
    if count + T > N:
        folded = tl.minimum(count, count + T - tl.maximum(keep, T))
    return folded


@triton.jit
def move_cursor(cursor_ptr, start, count, R: tl.constexpr):
    """Move the cursor to (start, count) as the last program of the launch: by then every other has read it."""
    if tl.atomic_add(cursor_ptr + 2, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(cursor_ptr, start % R)
        tl.store(cursor_ptr + 1, count)
        tl.store(cursor_ptr + 2, 0)


@triton.jit
def gathered(S, k, v, IS_FP16: tl.constexpr):
    """S + k^T v to float32's accuracy: S [K, V] and v [N, V] float32, k [N, K] of 16 bits."""
    if IS_FP16:
        up, down = factors(tl.max(tl.abs(v), None), -100, 14)
        v *= up
    # float32 holds 24 bits, a part in bfloat16 eight and one in float16 eleven.
    high = v.to(k.dtype)
    rest = v - high.to(tl.float32)
    middle = rest.to(k.dtype)
    low = (rest - middle.to(tl.float32)).to(k.dtype)
    k = tl.trans(k)
    if IS_FP16:
        S += (dot(k, low) + dot(k, middle) + dot(k, high)) * down
    else:
        S += dot(k, low)
        S += dot(k, middle)
        S += dot(k, high)
    return S


@triton.jit
def tiles_advanced(
    S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, is_key, new, held, given,
    q, among, before, to_row, kb, to_end, g_folded, scale,
    V: tl.constexpr, BV: tl.constexpr, ONE: tl.constexpr, FOLDS: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """Outputs and buffer entries of the tiles ``first`` to ``behind`` of BV columns; where FOLDS, their states, too.

    Rows are columns of addresses, [K, 1] of the state and [tokens, 1] of values and outputs, with masks likewise. The
    row of q [T, K] sees the state times to_row [T], new tokens by the scores ``among`` [T, T] and buffered ones by
    ``before`` [T, N]; of ONE token all of these are without T, and q is float32. S [K, BV] is the first tile's state,
    read already: a tile is always on its way to registers while the one in front is worked on. FOLDS, which leaves no
    registers for that: keys kb [N, K], of 16 bits, times to_end [N] join the state, which has decayed by g_folded,
    before outputs are taken from it.
    """
    if not FOLDS:
        value = (first * BV + tl.arange(0, BV))[None, :]
        v = tl.load(v_rows + value, mask=new & (value < V), other=0.0)
        vb = tl.load(buffered_rows + value, mask=held & (value < V), other=0.0)
    for i in range(first, behind):
        value = (i * BV + tl.arange(0, BV))[None, :]
        mask = value < V
        if FOLDS:
            S = tl.load(base_rows + value, mask=is_key & mask, other=0.0)
            v = tl.load(v_rows + value, mask=new & mask, other=0.0)
            vb = tl.load(buffered_rows + value, mask=held & mask, other=0.0)
            S = gathered(decayed(S, g_folded), kb, vb.to(tl.float32) * to_end[:, None], IS_FP16)
            tl.store(base_rows + value, S, mask=is_key & mask)
        else:
            ahead = value + BV
            more = ahead < tl.where(i + 1 < behind, V, 0)
            S_ahead = tl.load(base_rows + ahead, mask=is_key & more, other=0.0)
            v_ahead = tl.load(v_rows + ahead, mask=new & more, other=0.0)
            vb_ahead = tl.load(buffered_rows + ahead, mask=held & more, other=0.0)
        if ONE:  # too few rows for the matrix units
            o = tl.sum(q[:, None] * S, 0) * to_row
            o += tl.sum(before[:, None] * vb.to(tl.float32), 0)
            o = o[None, :] + among * v.to(tl.float32)
        else:
            o = dot_narrow(q, S, IS_FP16) * to_row[:, None]
            o += narrow_dot(among, v, IS_FP16)
            o += narrow_dot(before, vb, IS_FP16)
        tl.store(out_rows + value, (o * scale).to(out_rows.dtype.element_ty), mask=new & mask)
        tl.store(new_rows + value, v, mask=given & mask)
        if not FOLDS:
            S = S_ahead
            v = v_ahead
            vb = vb_ahead


@triton.jit
def fold(
    base_ptr, keys_ptr, values_ptr, decays_ptr, start, folded, value, stride_k, stride_v, stride_g,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """Take the ``folded`` oldest tokens into the columns ``value`` of a head's base state, a few of them at once."""
    ROWS: tl.constexpr = 32 if IS_FP32 else BK  # products in float32 are scalar code, which must stay short
    TOKENS: tl.constexpr = 16
    for first in range(0, K, ROWS):
        key = first + tl.arange(0, ROWS)
        at = base_ptr + key[:, None] * V + value[None, :]
        mask = (key < K)[:, None] & (value < V)[None, :]
        S = tl.load(at, mask=mask, other=0.0)
        for block in range(0, folded, TOKENS):
            n = block + tl.arange(0, TOKENS)
            old = n < folded
            slot = (start + n) % R
            tile_k = old[:, None] & (key < K)[None, :]
            tile_v = old[:, None] & (value < V)[None, :]
            k = tl.load(keys_ptr + (slot * stride_k)[:, None] + key[None, :], mask=tile_k, other=0.0)
            v = tl.load(values_ptr + (slot * stride_v)[:, None] + value[None, :], mask=tile_v, other=0.0)
            G, G_all = wide_sum(tl.load(decays_ptr + slot * stride_g, mask=old, other=0.0), IS_FP32)
            v = v.to(tl.float32) * tl.exp((G_all - G).to(tl.float32))[:, None]
            if IS_FP32:
                S = decayed(S, G_all) + dot(tl.trans(k), v)
            else:
                S = gathered(decayed(S, G_all), k, v, IS_FP16)
        tl.store(at, S, mask=mask)


@triton.jit
def tiles_stepped(
    S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, is_key, new, held, given,
    q, among, before, to_row, G, kb, gb, Gb, Gb_all, scale, folded,
    base_ptr, keys_ptr, values_ptr, decays_ptr, start, stride_k, stride_v, stride_g,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    ONE: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """`tiles_advanced` of a step that folds its ``folded`` oldest tokens, at once with the outputs or after them.

    ``before`` and to_row are those without folding; gb [N] are the buffered log_decays, Gb and Gb_all their running sum
    and their sum, G [T] the running sum of the new ones.
    """
    AT_ONCE: tl.constexpr = BN <= MOST_AT_ONCE and not IS_FP32  # in float32 no matrix unit takes the product
    if AT_ONCE and folded > 0:
        n = tl.arange(0, BN)
        old = n < folded
        g_folded = tl.sum(tl.where(old, gb, 0.0), 0)
        to_end = tl.where(old, tl.exp(g_folded - Gb), 0.0)
        to_row = tl.exp(G + tl.sum(tl.where(old, 0.0, gb), 0))
        before = tl.where(old if ONE else old[None, :], 0.0, before)
        tiles_advanced(
            S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, is_key, new, held, given,
            q, among, before, to_row, kb, to_end, g_folded, scale, V, BV, ONE, True, IS_FP16,
        )  # fmt: skip
    else:
        tiles_advanced(
            S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, is_key, new, held, given,
            q, among, before, to_row, kb, Gb, Gb_all, scale, V, BV, ONE, False, IS_FP16,
        )  # fmt: skip
    if not AT_ONCE and folded > 0:
        for i in range(first, behind):
            fold(
                base_ptr, keys_ptr, values_ptr, decays_ptr, start, folded, i * BV + tl.arange(0, BV), stride_k,
                stride_v, stride_g, K, V, BK, R, IS_FP32, IS_FP16,
            )  # fmt: skip
