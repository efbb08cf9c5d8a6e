"""FleetAttention in Triton: for each key channel, multiply and take a discounted cumulative sum over time.

The algorithm of `fleet`, with time cut into blocks, so that a block's v and o stay in registers while all channels pass
over them, and are read and written once. Inside a block the sum is an associative scan; from block to block each
channel carries one row of the state. Channels add up in one program, in order: no atomic additions, the same bits every
time. 7 K V flops a token without matrix units, and one state in memory; K T / C scans of a block of C tokens wait for
each other, and only sequences, heads and value columns run side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .on_triton import VARYING, Kernel, decay_parts, operator_of, sequence


@triton.jit
def discount(decay_a, sum_a, decay_b, sum_b):
    """Joins two runs of tokens: the decay over both, and the discounted sum at the end of the later."""
    return decay_a * decay_b, sum_a * decay_b + sum_b


@triton.jit(do_not_specialize=VARYING)
def fleet_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, o_ptr, state_ptr, cu_ptr,
    T, H, group_q, group_k, group_v, group_g, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * H * blocks of V,), blocks fastest; parameters as listed at `Kernel`."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    i_nh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_h = i_nh % H
    i_b, first, length = sequence(i_nh // H, cu_ptr, T, PACKED)

    r = tl.arange(0, C)
    y = (tl.program_id(0) % BLOCKS) * BV + tl.arange(0, BV)
    mask_y = y < V
    q_ptr += i_b * sqb + first * sqt + (i_h // group_q) * sqh
    k_ptr += i_b * skb + first * skt + (i_h // group_k) * skh
    v_ptr += i_b * svb + first * svt + (i_h // group_v) * svh + y[None, :]
    o_ptr += ((i_b * T + first) * H + i_h) * V + y[None, :]
    state_ptr += i_nh * K * V + y
    if DECAY == 2:
        g_ptr += i_b * sgb + first * sgt + (i_h // group_g) * sgh

    for i in range(0, tl.cdiv(length, C)):
        t = (i * C + r).to(tl.int64)
        n_valid = tl.minimum(length - i * C, C)
        mask_t = r < n_valid
        tile = mask_t[:, None] & mask_y[None, :]
        v = tl.load(v_ptr + t[:, None] * svt, mask=tile, other=0.0).to(tl.float32)
        # Tokens past the end neither add nor decay, so that the last row is the block's end, whatever its length.
        if DECAY == 1:
            g = tl.where(mask_t, tl.load(g_ptr + i_h // group_g), 0.0)
        if DECAY == 2:
            g = tl.load(g_ptr + t * sgt, mask=mask_t, other=0.0)
        if DECAY != 0:
            each = tl.broadcast_to(tl.exp(g)[:, None], (C, BV))
            g = g.to(tl.float64)
            from_start = tl.exp(tl.cumsum(g, 0).to(tl.float32))
            high, low = decay_parts(tl.sum(g, 0))

        o = tl.zeros((C, BV), dtype=tl.float32)
        for c in range(0, K):
            q = tl.load(q_ptr + t * sqt + c, mask=mask_t, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + t * skt + c, mask=mask_t, other=0.0).to(tl.float32)
            carried = tl.load(state_ptr + c * V, mask=mask_y, other=0.0)
            sums = k[:, None] * v
            if DECAY == 0:
                sums = tl.cumsum(sums, 0)
            else:
                _, sums = tl.associative_scan((each, sums), 0, discount)
            own = tl.sum(tl.where(r[:, None] == C - 1, sums, 0.0), 0)
            if DECAY == 0:
                sums += carried[None, :]
                carried += own
            else:
                sums += from_start[:, None] * carried[None, :]
                carried = carried * high + (carried * low + own)
            o += q[:, None] * sums
            tl.store(state_ptr + c * V, carried, mask=mask_y)
        tl.store(o_ptr + t[:, None] * H * V, (o * scale).to(o_ptr.dtype.element_ty), mask=tile)
        tl.debug_barrier()  # the rows of the state may be read by other threads than wrote them


def _blocks(key_dim: int, value_dim: int, interpreting: bool) -> tuple[int, dict[str, int], int]:
    """32 tokens x 32 columns for one warp: a lane holds all of a column's tokens, and scans them in its registers.

    Any other shape spreads a column over lanes, and the scan becomes exchanges between them. The interpreter scans
    entry by entry: small tiles, so that little is scanned past the end.
    """
    return (16, {"C": 16}, 1) if interpreting else (32, {"C": 32}, 1)


forward = operator_of(Kernel(fleet_kernel, _blocks))
