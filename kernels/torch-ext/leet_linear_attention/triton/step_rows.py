"""One launch of the buffered decode step for several tokens: see ``step`` for what it does and for one token.

The scores of the new tokens, a chain of small products, are worked out once for all tiles of a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import dot, wait_for_inputs
from .ring import (
    buffered_tokens,
    first_tile,
    move_cursor,
    number_folded,
    part_of_head,
    tiles_of_program,
    tiles_stepped,
    wide_sum,
)


@triton.jit(
    do_not_specialize=[
        "T", "H", "group_q", "group_k", "group_v", "group_g", "keep", "tiles",
        "sqb", "sqt", "sqh", "skb", "skt", "skh", "svb", "svt", "svh", "sgb", "sgt", "sgh",
    ]
)  # fmt: skip
def rows_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, base_ptr, keys_ptr, values_ptr, decays_ptr, cursor_ptr, out_ptr,
    T, H, group_q, group_k, group_v, group_g, scale, keep, tiles,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, DECAY: tl.constexpr, ALIGN: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of ``tiles`` tiles of BV columns,), blocks fastest. T <= BT and N <= BN. Ring: ``ring``."""
    R: tl.constexpr = 2 * N
    i_bh, first, behind = tiles_of_program(tiles, V, BV)
    i_b = i_bh // H
    i_h = i_bh % H
    wait_for_inputs(OVERLAP)
    start = tl.load(cursor_ptr)
    count = tl.load(cursor_ptr + 1)

    base_ptr, keys_ptr, values_ptr, decays_ptr, stride_k, stride_v = part_of_head(
        base_ptr, keys_ptr, values_ptr, decays_ptr, i_bh, H, group_k, group_v, K, V, R
    )
    # Strides come divided by ALIGN: the product tells the compiler that loads may be 16 bytes wide.
    sqt *= ALIGN
    skt *= ALIGN
    svt *= ALIGN
    q_ptr += (i_b * sqb + (i_h // group_q) * sqh) * ALIGN
    k_ptr += (i_b * skb + (i_h // group_k) * skh) * ALIGN
    v_ptr += (i_b * svb + (i_h // group_v) * svh) * ALIGN
    out_ptr += (i_b * T * H + i_h) * V

    key = tl.arange(0, BK)
    mask_k = key < K
    base_rows, S = first_tile(base_ptr, key, mask_k, first, V, BV)
    t = tl.arange(0, BT)
    new = t < T
    if DECAY == 0:
        g = tl.zeros((BT,), dtype=tl.float32)
    elif DECAY == 1:
        g = tl.where(new, tl.load(g_ptr + i_h // group_g), 0.0)
    else:
        g = tl.load(g_ptr + i_b * sgb + t * sgt + (i_h // group_g) * sgh, mask=new, other=0.0)
    tile_k = new[:, None] & mask_k[None, :]
    q = tl.load(q_ptr + (t * sqt)[:, None] + key[None, :], mask=tile_k, other=0.0)
    k = tl.load(k_ptr + (t * skt)[:, None] + key[None, :], mask=tile_k, other=0.0)
    G, _ = wide_sum(g, IS_FP32)

    slot, held, kb, gb, Gb, Gb_all = buffered_tokens(
        keys_ptr, decays_ptr, start, count, key, mask_k, stride_k, H, BN, R, IS_FP32
    )

    causal = t[:, None] >= t[None, :]
    among = dot(q, tl.trans(k)) * tl.exp(tl.where(causal, G[:, None] - G[None, :], 0.0).to(tl.float32))
    among = tl.where(causal, among, 0.0)
    before = dot(q, tl.trans(kb)) * tl.exp((G[:, None] + (Gb_all - Gb)[None, :]).to(tl.float32))
    before = tl.where(held[None, :], before, 0.0)
    to_row = tl.exp((G + Gb_all).to(tl.float32))

    # The new tokens' slots lie behind the buffered ones: 2 N of them, so none that is read in this launch is written.
    at = (start + count + t) % R
    given = t < tl.where(i_h % group_v == 0, T, 0)  # by the first of the heads that share values
    v_rows = v_ptr + (t * svt)[:, None]
    buffered_rows = values_ptr + (slot * stride_v)[:, None]
    new_rows = values_ptr + (at * stride_v)[:, None]
    out_rows = out_ptr + (t * H * V)[:, None]
    # The oldest tokens are folded where the new ones find no room.
    folded = number_folded(count, T, keep, N)
    tiles_stepped(
        S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, mask_k[:, None], new[:, None],
        held[:, None], given[:, None], q, among, before, to_row, G, kb, gb, Gb, Gb_all, scale, folded,
        base_ptr, keys_ptr, values_ptr, decays_ptr, start, stride_k, stride_v, H,
        K, V, BK, BV, BN, R, False, IS_FP32, IS_FP16,
    )  # fmt: skip

    if first == 0:
        tl.store(decays_ptr + at * H, g, mask=new)
        if i_h % group_k == 0:
            tl.store(keys_ptr + (at * stride_k)[:, None] + key[None, :], k, mask=tile_k)

    move_cursor(cursor_ptr, start + folded, count - folded + T, R)
