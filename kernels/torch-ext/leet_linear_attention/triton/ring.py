"""What the kernels of the decode step share: one head's part of the ring of buffered tokens, folding, the cursor.

The ring has R = 2 N slots: keys [B, R, Hk, K], values [B, R, Hv, V], decays [B, R, H]. The cursor is (start, count,
ticket).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import decayed, dot, factors


@triton.jit
def wide_sum(g, PRECISE: tl.constexpr):
    """Running sum and total of log_decays, in float64 where PRECISE."""
    if PRECISE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0), tl.sum(g, 0)


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
def gathered(S, k, v, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr):
    """S + k^T v: S [K, V] and v [N, V] float32; k [N, K], of 16 bits unless IS_FP32."""
    if IS_FP32:
        S += dot(tl.trans(k), v)
    else:
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
def block_folded(
    S, keys_ptr, values_ptr, decays_ptr, start, block, folded, key, value, stride_k, stride_v, stride_g,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, IS_FP32: tl.constexpr,
    IS_FP16: tl.constexpr,
):  # fmt: skip
    """Rows ``key`` and columns ``value`` of a state, S, after those of the ``folded`` tokens that are in a block."""
    n = block + tl.arange(0, TOKENS)
    old = n < folded
    slot = (start + n) % R
    g = tl.load(decays_ptr + slot * stride_g, mask=old, other=0.0)
    tile_k = old[:, None] & (key < K)[None, :]
    tile_v = old[:, None] & (value < V)[None, :]
    k = tl.load(keys_ptr + (slot * stride_k)[:, None] + key[None, :], mask=tile_k, other=0.0)
    v = tl.load(values_ptr + (slot * stride_v)[:, None] + value[None, :], mask=tile_v, other=0.0)
    G, G_all = wide_sum(g, IS_FP32)
    v = v.to(tl.float32) * tl.exp((G_all - G).to(tl.float32))[:, None]
    return gathered(decayed(S, G_all), k, v, IS_FP32, IS_FP16)


@triton.jit
def fold(
    base_ptr, keys_ptr, values_ptr, decays_ptr, start, folded, value, stride_k, stride_v, stride_g,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """Take the ``folded`` oldest tokens into the columns ``value`` of a head's base state, to float32's accuracy.

    All is read again: registers that only a fold needs would be missing in every step.
    """
    ROWS: tl.constexpr = 32 if IS_FP32 else BK  # products in float32 are scalar code, which must stay short
    TOKENS: tl.constexpr = 16
    for first in range(0, K, ROWS):
        key = first + tl.arange(0, ROWS)
        at = base_ptr + key[:, None] * V + value[None, :]
        mask = (key < K)[:, None] & (value < V)[None, :]
        # What comes next is the next step, when no cache holds it any more.
        S = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        if R <= 2 * TOKENS and not IS_FP32:  # a loop would cost registers, of which several tokens leave none
            S = block_folded(
                S, keys_ptr, values_ptr, decays_ptr, start, 0, folded, key, value, stride_k, stride_v, stride_g,
                K, V, R, TOKENS, IS_FP32, IS_FP16,
            )  # fmt: skip
        else:
            for block in range(0, folded, TOKENS):
                S = block_folded(
                    S, keys_ptr, values_ptr, decays_ptr, start, block, folded, key, value, stride_k, stride_v, stride_g,
                    K, V, R, TOKENS, IS_FP32, IS_FP16,
                )  # fmt: skip
        tl.store(at, S, mask=mask, eviction_policy="evict_first")
