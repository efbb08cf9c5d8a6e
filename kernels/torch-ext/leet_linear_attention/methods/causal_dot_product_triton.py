"""Causal dot product in Triton: the recurrence, token after token, with the state in registers and in one launch.

The algorithm of `causal_dot_product`. A program holds all keys' rows of a block of state columns, reads each token once
and writes its output: no memory besides inputs, outputs and one state, and 4 K V flops a token without matrix units.
T steps wait for each other, so a program takes T times the latency of one step however fast the device is; only
sequences, heads and value columns run side by side. The next token is loaded before this one is worked on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton.tuning import block_of
from .on_triton import VARYING, Kernel, decay_parts, operator_of, sequence


@triton.jit(do_not_specialize=VARYING)
def recurrence_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, o_ptr, state_ptr, cu_ptr,
    T, H, group_q, group_k, group_v, group_g, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    PRECISE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * H * blocks of V,), blocks fastest; parameters as listed at `Kernel`."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    i_nh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_h = i_nh % H
    i_b, first, length = sequence(i_nh // H, cu_ptr, T, PACKED)

    x = tl.arange(0, BK)
    y = (tl.program_id(0) % BLOCKS) * BV + tl.arange(0, BV)
    mask_x = x < K
    mask_y = y < V
    q_ptr += i_b * sqb + first * sqt + (i_h // group_q) * sqh + x
    k_ptr += i_b * skb + first * skt + (i_h // group_k) * skh + x
    v_ptr += i_b * svb + first * svt + (i_h // group_v) * svh + y
    o_ptr += ((i_b * T + first) * H + i_h) * V + y
    state_ptr += i_nh * K * V + x[:, None] * V + y[None, :]
    mask_state = mask_x[:, None] & mask_y[None, :]
    S = tl.load(state_ptr, mask=mask_state, other=0.0)
    if DECAY == 1:
        high, low = decay_parts(tl.load(g_ptr + i_h // group_g))
    if DECAY == 2:
        g_ptr += i_b * sgb + first * sgt + (i_h // group_g) * sgh

    # Comparisons of whole blocks: in the interpreter one of a scalar is no tensor.
    q_next = tl.load(q_ptr, mask=mask_x & (x * 0 < length), other=0.0)
    k_next = tl.load(k_ptr, mask=mask_x & (x * 0 < length), other=0.0)
    v_next = tl.load(v_ptr, mask=mask_y & (y * 0 < length), other=0.0)
    for t in range(0, length):
        q = q_next.to(tl.float32)
        k = k_next.to(tl.float32)
        v = v_next.to(tl.float32)
        if DECAY == 2:
            high, low = decay_parts(tl.load(g_ptr))
            g_ptr += sgt
        q_ptr += sqt
        k_ptr += skt
        v_ptr += svt
        q_next = tl.load(q_ptr, mask=mask_x & (x * 0 + t + 1 < length), other=0.0)
        k_next = tl.load(k_ptr, mask=mask_x & (x * 0 + t + 1 < length), other=0.0)
        v_next = tl.load(v_ptr, mask=mask_y & (y * 0 + t + 1 < length), other=0.0)

        update = k[:, None] * v[None, :]
        if DECAY == 0:
            S += update
        elif DECAY == 1 or PRECISE:
            S = S * high + (S * low + update)
        else:
            S = S * high + update
        o = tl.sum(q[:, None] * S, 0) * scale
        tl.store(o_ptr, o.to(o_ptr.dtype.element_ty), mask=mask_y)
        o_ptr += H * V
    tl.store(state_ptr, S, mask=mask_state)


def _blocks(key_dim: int, value_dim: int, interpreting: bool) -> tuple[int, dict[str, int], int]:
    """About 1024 state entries for a program of one warp, whose sums over keys then need no other warp to wait for."""
    block_k = block_of(key_dim)
    block_v = block_of(value_dim)
    return block_v if interpreting else min(block_v, max(8, 1024 // block_k)), {"BK": block_k}, 1


forward = operator_of(Kernel(recurrence_kernel, _blocks))
