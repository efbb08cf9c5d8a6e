"""Gradient of log_decay, chunk by chunk, from the states both sweeps left behind.

dg_t sums W_ji = scale exp(G_j - G_i) (q_j . k_i)(do_j . v_i) over the pairs i < t <= j that the decay of token t lies
between. The common form, a running sum of q.dq - k.dk, contains the pairs i = j, which no decay touches, and gathers
the rounding of every later token; here each kind of pair is summed by itself and nothing cancels:
both in the chunk; i before it; j behind it; i before and j behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shapes import sequence_count, sum_groups
from . import tuning
from .common import dot, dot_narrow, token_decay
from .launcher import Launcher, device_index


@triton.jit(
    do_not_specialize=[
        "T", "H", "group_q", "group_k", "group_v", "group_g",
        "sqb", "sqt", "sqh", "skb", "skt", "skh", "svb", "svt", "svh", "sdb", "sdt", "sdh", "sgb", "sgt", "sgh",
    ]
)  # fmt: skip
def decay_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, g_ptr, s_ptr, r_ptr, dg_ptr, cu_ptr,
    T, H, group_q, group_k, group_v, group_g, scale,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sdb, sdt, sdh, sgb, sgt, sgh,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PER_TOKEN: tl.constexpr, PACKED: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * H, chunks). s, r: [slots, H, V, K], states before a chunk and gradients / scale behind it."""
    i_c = tl.program_id(1)
    i_nh = tl.program_id(0).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H
    if PACKED:
        bos = tl.load(cu_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_ptr + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        i_b = bos * 0
        slot = bos // C + i_n + i_c
    else:
        bos = i_n * 0
        length = T
        i_b = i_n
        slot = i_n * tl.cdiv(T, C) + i_c
    n_valid = tl.minimum(length - i_c * C, C)
    if n_valid > 0:
        t0 = (i_c * C).to(tl.int64)
        r = tl.arange(0, C)
        mask_t = r < n_valid
        key = tl.arange(0, BK)
        mask_k = key < K
        q_at = q_ptr + i_b * sqb + (bos + t0) * sqt + (i_h // group_q) * sqh
        k_at = k_ptr + i_b * skb + (bos + t0) * skt + (i_h // group_k) * skh
        v_at = v_ptr + i_b * svb + (bos + t0) * svt + (i_h // group_v) * svh
        do_at = do_ptr + i_b * sdb + (bos + t0) * sdt + i_h * sdh
        states = (slot * H + i_h) * K * V
        tile_k = mask_t[:, None] & mask_k[None, :]
        q = tl.load(q_at + r[:, None] * sqt + key[None, :], mask=tile_k, other=0.0)
        k = tl.load(k_at + r[:, None] * skt + key[None, :], mask=tile_k, other=0.0)

        if PER_TOKEN:
            G, G_end = token_decay(g_ptr + i_b * sgb + bos * sgt + (i_h // group_g) * sgh, sgt, t0, n_valid, C, IS_FP32)
        else:
            g = tl.load(g_ptr + i_h // group_g)
            if IS_FP32:
                g = g.to(tl.float64)
            G = g * tl.minimum(r + 1, n_valid)
            G_end = g * n_valid

        pairs = tl.zeros((C, C), dtype=tl.float32)  # do_j . v_i at [j, i]
        rows = tl.zeros((C,), dtype=tl.float32)
        columns = tl.zeros((C,), dtype=tl.float32)
        through = tl.zeros((BK,), dtype=tl.float32)
        for i_v in range(0, tl.cdiv(V, BV)):
            value = i_v * BV + tl.arange(0, BV)
            mask_v = value < V
            tile_v = mask_t[:, None] & mask_v[None, :]
            v = tl.load(v_at + r[:, None] * svt + value[None, :], mask=tile_v, other=0.0)
            do = tl.load(do_at + r[:, None] * sdt + value[None, :], mask=tile_v, other=0.0)
            o_state = states + key[:, None] + value[None, :] * K
            mask_s = mask_k[:, None] & mask_v[None, :]
            S = tl.load(s_ptr + o_state, mask=mask_s, other=0.0).to(tl.float32)
            R = tl.load(r_ptr + o_state, mask=mask_s, other=0.0).to(tl.float32)
            pairs += dot(do, tl.trans(v))
            rows += tl.sum(dot_narrow(q, S, IS_FP16) * do.to(tl.float32), 1)
            columns += tl.sum(dot_narrow(k, R, IS_FP16) * v.to(tl.float32), 1)
            through += tl.sum(S * R, 1)
        rows *= tl.exp(G.to(tl.float32)) * scale
        columns *= tl.exp((G_end - G).to(tl.float32)) * scale
        crossing = tl.sum(through, 0) * tl.exp(G_end.to(tl.float32)) * scale

        pairs *= scale * dot(q, tl.trans(k))
        before = r[:, None] > r[None, :]  # i < j, at [j, i]
        pairs *= tl.exp(tl.where(before, G[:, None] - G[None, :], 0.0).to(tl.float32))
        pairs = tl.where(before, pairs, 0.0)
        # over[t, i] = sum of pairs[j, i] with j >= t; then the columns i < t of row t.
        over = tl.cumsum(pairs, 0, reverse=True)
        dg = tl.sum(tl.where(before, over, 0.0), 1)
        dg += tl.cumsum(rows, 0, reverse=True)
        # not cumsum - columns: the token's own would bury the rest
        dg += tl.sum(tl.where(before, columns[None, :], 0.0), 1)
        dg += crossing
        tl.store(dg_ptr + ((i_b * T + bos + t0) + r) * H + i_h, dg, mask=mask_t)


_decay_gradient = Launcher(decay_gradient_kernel)


def decay_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    log_decay: torch.Tensor,
    heads: int,
    states: torch.Tensor,
    gradients: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    chunk: int,
) -> torch.Tensor:
    """dlog_decay in log_decay's shape; ``states`` and ``gradients`` [slots, H, V, K] meet chunks from either side."""
    batch, tokens = q.shape[:2]
    sequences = sequence_count(q, cu_seqlens)
    per_token = log_decay.dim() == 3
    dg = q.new_empty((batch, tokens, heads), dtype=torch.float32)
    block_k = tuning.block_of(q.shape[-1])
    block_v = tuning.decay_gradient_block(block_k, v.shape[-1], q.element_size())
    if dg.numel() == 0:
        return torch.zeros_like(log_decay)
    _decay_gradient(
        (sequences * heads, triton.cdiv(tokens, chunk)), device_index(q),
        (q, k, v, do, log_decay, states, gradients, dg, cu_seqlens),
        (
            tokens, heads, heads // q.shape[2], heads // k.shape[2], heads // v.shape[2],
            heads // log_decay.shape[-1], scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            *(log_decay.stride() if per_token else (0, 0, 0)),
        ),
        (
            q.shape[-1], v.shape[-1], chunk, block_k, block_v, per_token, cu_seqlens is not None,
            q.dtype == torch.float32, q.dtype == torch.float16,
        ),
        4 if block_k <= 128 else 8, 1,
    )  # fmt: skip
    dg = sum_groups(dg.unsqueeze(-1), log_decay.shape[-1]).squeeze(-1)
    return dg if per_token else dg.sum((0, 1), dtype=torch.float64).to(log_decay.dtype)
