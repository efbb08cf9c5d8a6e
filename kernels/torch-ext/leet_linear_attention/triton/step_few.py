"""Outputs of a decode step of two to four tokens, summed from registers.

The matrix units take sixteen rows and want the state in 16 bits in shared memory first. Here every program multiplies
what it has loaded by the queries and adds up in registers, for all tokens; sums over threads come once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import wide_sum


@triton.jit
def four(x0, x1, x2, x3):
    """Four tensors as one with two more dims of 2, in the registers where they are: one exchange sums all of them."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def apart(x):
    """The four tensors of `four`."""
    x02, x13 = tl.split(x)
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    return x0, x1, x2, x3


@triton.jit
def new_decay(g_ptr, i, T, stride, DECAY: tl.constexpr):
    """The log_decay of new token i < T; 0 of one there is not."""
    if DECAY == 0:
        return 0.0
    elif DECAY == 1:
        return tl.load(g_ptr) * (i < T).to(tl.float32)
    else:
        return tl.load(g_ptr + i * stride, mask=i < T, other=0.0)


@triton.jit
def gathered(a0, a1, a2, a3, keys, values, q0, q1, q2, q3, C, E0, E1, E2, E3, ends):
    """Add to a0 ... a3 [ROWS, BV] the values [ROWS, BV] of tokens by their scores with queries 0 ... 3.

    keys [ROWS, BK]; C [ROWS]: log_decays summed up to each token; E0 ... E3: up to each query; ends [ROWS]: which of the
    queries is the first to see a token, 4 if none does.
    """
    k = keys.to(tl.float32)
    v = values.to(tl.float32)
    w0, w1, w2, w3 = apart(tl.sum(four(k * q0, k * q1, k * q2, k * q3), 1))
    nothing = float("-inf")
    a0 += (w0 * tl.exp(tl.where(ends <= 0, (E0 - C).to(tl.float32), nothing)))[:, None] * v
    a1 += (w1 * tl.exp(tl.where(ends <= 1, (E1 - C).to(tl.float32), nothing)))[:, None] * v
    a2 += (w2 * tl.exp(tl.where(ends <= 2, (E2 - C).to(tl.float32), nothing)))[:, None] * v
    a3 += (w3 * tl.exp(tl.where(ends <= 3, (E3 - C).to(tl.float32), nothing)))[:, None] * v
    return a0, a1, a2, a3


@triton.jit
def few_outputs(
    base_ptr, q_ptr, g_ptr, out_ptr, keys_ptr, values_ptr, decays_ptr, start, count, k, v, key, value, T, scale,
    stride_q, stride_g, stride_out, stride_keys, stride_values, stride_decays,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, DECAY: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Write the outputs of T <= 4 tokens, whose keys k [16, BK] and values v [16, BV] are 0 from row T on.

    base_ptr: a head's state, of which this program has the columns ``value``. q_ptr, g_ptr, out_ptr: the head's first token.
    keys_ptr, values_ptr, decays_ptr: its part of a ring of R slots, ``count`` <= BN of which are held, from ``start`` on.
    """
    ROWS: tl.constexpr = 16
    row = tl.arange(0, ROWS)
    mask_k = key < K
    mask_v = value < V
    # The state, some rows at a time, so that nothing waits for the tokens but what needs them.
    a0 = tl.zeros((ROWS, BV), dtype=tl.float32)
    a1, a2, a3 = a0, a0, a0
    K1, K2, K3 = tl.where(T > 1, K, 0), tl.where(T > 2, K, 0), tl.where(T > 3, K, 0)  # queries there are not are 0
    for first in tl.static_range(0, BK, ROWS):
        at = first + row
        there = at < K
        S = tl.load(base_ptr + at[:, None] * V + value[None, :], mask=there[:, None] & mask_v[None, :], other=0.0)
        a0 += S * tl.load(q_ptr + at, mask=there, other=0.0).to(tl.float32)[:, None]
        a1 += S * tl.load(q_ptr + stride_q + at, mask=at < K1, other=0.0).to(tl.float32)[:, None]
        a2 += S * tl.load(q_ptr + 2 * stride_q + at, mask=at < K2, other=0.0).to(tl.float32)[:, None]
        a3 += S * tl.load(q_ptr + 3 * stride_q + at, mask=at < K3, other=0.0).to(tl.float32)[:, None]
    # Every row of these tiles is the same: loaded so, they are where the keys will be, without an exchange.
    at = row[:, None] * 0 + key[None, :]
    q0 = tl.load(q_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    q1 = tl.load(q_ptr + stride_q + at, mask=at < K1, other=0.0).to(tl.float32)
    q2 = tl.load(q_ptr + 2 * stride_q + at, mask=at < K2, other=0.0).to(tl.float32)
    q3 = tl.load(q_ptr + 3 * stride_q + at, mask=at < K3, other=0.0).to(tl.float32)

    # Decays summed from the oldest token in the ring on, up to each query.
    n = tl.arange(0, BN)
    _, before = wide_sum(tl.load(decays_ptr + ((start + n) % R) * stride_decays, mask=n < count, other=0.0), PRECISE)
    E0 = before + new_decay(g_ptr, 0, T, stride_g, DECAY)
    E1 = E0 + new_decay(g_ptr, 1, T, stride_g, DECAY)
    E2 = E1 + new_decay(g_ptr, 2, T, stride_g, DECAY)
    E3 = E2 + new_decay(g_ptr, 3, T, stride_g, DECAY)
    a0 *= tl.exp(E0.to(tl.float32))
    a1 *= tl.exp(E1.to(tl.float32))
    a2 *= tl.exp(E2.to(tl.float32))
    a3 *= tl.exp(E3.to(tl.float32))

    passed = before * 0.0
    for first in tl.static_range(0, BN, ROWS):
        held = first + row < count
        slot = (start + first + row) % R
        C, over = wide_sum(tl.load(decays_ptr + slot * stride_decays, mask=held, other=0.0), PRECISE)
        keys = tl.load(
            keys_ptr + (slot * stride_keys)[:, None] + key[None, :], mask=held[:, None] & mask_k[None, :], other=0.0
        )
        values = tl.load(
            values_ptr + (slot * stride_values)[:, None] + value[None, :], mask=held[:, None] & mask_v[None, :], other=0.0
        )
        ends = tl.where(held, 0, 4)
        a0, a1, a2, a3 = gathered(
            a0, a1, a2, a3, keys, values, q0, q1, q2, q3, passed + C, E0, E1, E2, E3, ends
        )  # fmt: skip
        passed += over
    C = tl.where(row == 0, E0, tl.where(row == 1, E1, tl.where(row == 2, E2, E3)))
    a0, a1, a2, a3 = gathered(a0, a1, a2, a3, k, v, q0, q1, q2, q3, C, E0, E1, E2, E3, tl.minimum(row, 4))

    o0, o1, o2, o3 = apart(tl.sum(four(a0, a1, a2, a3), 0) * scale)
    out = out_ptr + value
    tl.store(out, o0.to(out_ptr.dtype.element_ty), mask=mask_v)
    tl.store(out + stride_out, o1.to(out_ptr.dtype.element_ty), mask=value < tl.where(T > 1, V, 0))
    tl.store(out + 2 * stride_out, o2.to(out_ptr.dtype.element_ty), mask=value < tl.where(T > 2, V, 0))
    tl.store(out + 3 * stride_out, o3.to(out_ptr.dtype.element_ty), mask=value < tl.where(T > 3, V, 0))
