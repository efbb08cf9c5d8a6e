"""One launch of the buffered decode step: outputs, the buffer's new entries, and its folding when it is full.

Every program holds one tile of one head's base state. The state is written only when the buffer folds, once in
``buffer`` tokens, so a step reads the state and little else. The cursor (start, count) is read by all programs and
advanced by whichever finishes last, which the ticket beside it decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..torch_step import step as torch_step
from . import tuning
from .common import decayed, dot, dot_narrow, narrow_dot
from .launcher import Launcher, device_index


@triton.jit
def running_sum(g, PRECISE: tl.constexpr):
    if PRECISE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit(
    do_not_specialize=[
        "T", "H", "group_q", "group_k", "group_v", "group_g", "keep",
        "sqb", "sqt", "sqh", "skb", "skt", "skh", "svb", "svt", "svh", "sgb", "sgt", "sgh",
    ]
)  # fmt: skip
def step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, base_ptr, keys_ptr, values_ptr, decays_ptr, cursor_ptr, out_ptr,
    T, H, group_q, group_k, group_v, group_g, scale, keep,
    sqb, sqt, sqh, skb, skt, skh, svb, svt, svh, sgb, sgt, sgh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, FEW: tl.constexpr, DECAY: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of V,), blocks fastest. FEW: at most so many new tokens, where that is a handful; else 0.

    The ring has R = 2 N slots: keys [B, R, Hk, K], values [B, R, Hv, V], decays [B, R, H].
    """
    R: tl.constexpr = 2 * N
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    i_v = tl.program_id(0) % BLOCKS
    i_bh = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    h_k = i_h // group_k
    h_v = i_h // group_v
    heads_k = H // group_k
    heads_v = H // group_v
    start = tl.load(cursor_ptr)
    count = tl.load(cursor_ptr + 1)

    key = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    mask_k = key < K
    mask_v = value < V
    o_state = base_ptr + i_bh * K * V + key[:, None] * V + value[None, :]
    mask_s = mask_k[:, None] & mask_v[None, :]
    S = tl.load(o_state, mask=mask_s, other=0.0)

    # Buffered tokens, oldest first.
    n = tl.arange(0, BN)
    slot = (start + n) % R
    held = n < count
    kb = tl.load(
        keys_ptr + ((i_b * R + slot) * heads_k + h_k)[:, None] * K + key[None, :],
        mask=held[:, None] & mask_k[None, :], other=0.0,
    )  # fmt: skip
    vb = tl.load(
        values_ptr + ((i_b * R + slot) * heads_v + h_v)[:, None] * V + value[None, :],
        mask=held[:, None] & mask_v[None, :], other=0.0,
    )  # fmt: skip
    gb = tl.load(decays_ptr + (i_b * R + slot) * H + i_h, mask=held, other=0.0)
    Gb, Gb_all = running_sum(gb, IS_FP32)

    # New tokens.
    t = tl.arange(0, BT)
    new = t < T
    q_at = q_ptr + i_b * sqb + (i_h // group_q) * sqh
    k_at = k_ptr + i_b * skb + h_k * skh
    v_at = v_ptr + i_b * svb + h_v * svh
    if DECAY == 0:
        g = tl.zeros((BT,), dtype=tl.float32)
    elif DECAY == 1:
        g = tl.where(new, tl.load(g_ptr + i_h // group_g), 0.0)
    else:
        g = tl.load(g_ptr + i_b * sgb + t * sgt + (i_h // group_g) * sgh, mask=new, other=0.0)

    tile_k = new[:, None] & mask_k[None, :]
    tile_v = new[:, None] & mask_v[None, :]
    k = tl.load(k_at + t[:, None] * skt + key[None, :], mask=tile_k, other=0.0)
    v = tl.load(v_at + t[:, None] * svt + value[None, :], mask=tile_v, other=0.0)
    G, _ = running_sum(g, IS_FP32)
    out_at = out_ptr + (i_b * T * H + i_h) * V
    if BT == 1:
        # Too few rows for the matrix units.
        q = tl.load(q_at + key, mask=mask_k, other=0.0).to(tl.float32)
        g_now = tl.sum(G, 0)
        w_b = tl.sum(kb.to(tl.float32) * q[None, :], 1) * tl.exp((Gb_all - Gb + g_now).to(tl.float32))
        w = tl.sum(k.to(tl.float32) * q[None, :], 1)
        o = tl.sum(q[:, None] * S, 0) * tl.exp((Gb_all + g_now).to(tl.float32))
        o += tl.sum(tl.where(held, w_b, 0.0)[:, None] * vb.to(tl.float32), 0)
        o += tl.sum(w[:, None] * v.to(tl.float32), 0)
        tl.store(out_at + value, (o * scale).to(out_ptr.dtype.element_ty), mask=mask_v)
    else:
        q = tl.load(q_at + t[:, None] * sqt + key[None, :], mask=tile_k, other=0.0)
        lag = G[:, None] - G[None, :]
        causal = t[:, None] >= t[None, :]
        A = dot(q, tl.trans(k)) * tl.exp(tl.where(causal, lag, 0.0).to(tl.float32))
        A = tl.where(causal, A, 0.0)
        A_b = dot(q, tl.trans(kb)) * tl.exp((G[:, None] + (Gb_all - Gb)[None, :]).to(tl.float32))
        A_b = tl.where(held[None, :], A_b, 0.0)
        if FEW > 0:
            # The state stays in registers: on its way to the matrix units it would pass through shared memory.
            o = tl.zeros((BT, BV), dtype=tl.float32)
            for i in tl.static_range(FEW):
                q_i = tl.load(q_at + i * sqt + key, mask=mask_k & (key * 0 + i < T), other=0.0).to(tl.float32)
                o = tl.where(t[:, None] == i, tl.sum(q_i[:, None] * S, 0)[None, :], o)
        else:
            o = dot_narrow(q, S, IS_FP16)
        o *= tl.exp((G + Gb_all).to(tl.float32))[:, None]
        o += narrow_dot(A, v, IS_FP16)
        o += narrow_dot(A_b, vb, IS_FP16)
        tl.store(out_at + t[:, None] * (H * V) + value[None, :], (o * scale).to(out_ptr.dtype.element_ty), mask=tile_v)

    # Fold the oldest tokens where the new ones find no room, one after another: exact in float32, and unlike a product
    # of matrices it needs no more registers than the state, which every step would pay for.
    folded = count * 0
    if count + T > N:
        folded = tl.minimum(count, count + T - tl.maximum(keep, T))
    if folded > 0:
        old = n < folded
        G_old = tl.sum(tl.where(old, gb, 0.0).to(Gb.dtype), 0)
        S = decayed(S, G_old)
        for j in range(0, folded):
            factor = tl.exp(tl.sum(tl.where(old & (n > j), gb, 0.0).to(Gb.dtype), 0).to(tl.float32))
            slot_j = (start + j) % R
            k_j = tl.load(keys_ptr + ((i_b * R + slot_j) * heads_k + h_k) * K + key, mask=mask_k, other=0.0)
            v_j = tl.load(values_ptr + ((i_b * R + slot_j) * heads_v + h_v) * V + value, mask=mask_v, other=0.0)
            S += k_j.to(tl.float32)[:, None] * (v_j.to(tl.float32) * factor)[None, :]
        tl.store(o_state, S, mask=mask_s)

    # Append. Slots behind the buffered ones: 2 N of them, so none that is read in this launch is written.
    at = (start + count + t) % R
    if i_h % group_v == 0:
        to_value = values_ptr + ((i_b * R + at) * heads_v + h_v)[:, None] * V + value[None, :]
        tl.store(to_value, v, mask=tile_v)
    if i_v == 0:
        tl.store(decays_ptr + (i_b * R + at) * H + i_h, g, mask=new)
        if i_h % group_k == 0:
            to_key = keys_ptr + ((i_b * R + at) * heads_k + h_k)[:, None] * K + key[None, :]
            tl.store(to_key, k, mask=tile_k)

    # The last program of the launch moves the cursor: by then every other has read it.
    if tl.atomic_add(cursor_ptr + 2, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(cursor_ptr, (start + folded) % R)
        tl.store(cursor_ptr + 1, count - folded + T)
        tl.store(cursor_ptr + 2, 0)


_step = Launcher(step_kernel)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    base: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    log_decays: torch.Tensor,
    cursor: torch.Tensor,
    scale: float,
    buffer: int,
    keep: int,
) -> torch.Tensor:
    """Advance the decode state in base, keys, values, log_decays and cursor by T tokens; returns o [B, T, H, V]."""
    batch, tokens = q.shape[:2]
    heads, width_k, width_v = base.shape[1:]
    out = q.new_empty(batch, tokens, heads, width_v)
    if out.numel() == 0:
        return out
    decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
    sg = log_decay.stride() if log_decay is not None and decay == 2 else (0, 0, 0)
    config = tuning.step_config(width_k, width_v)
    rows = 1 if tokens == 1 else tuning.block_of(tokens)
    if not tuning.step_fits(rows, buffer, width_k, config.block_v, q.element_size(), device_index(q)):
        # Wide windows for taking back tokens; the torch form serves any size, and reads the cursor on the host.
        return torch_step(q, k, v, log_decay, base, keys, values, log_decays, cursor, scale, buffer, keep)
    _step(
        (triton.cdiv(width_v, config.block_v) * batch * heads,), device_index(q),
        (q, k, v, log_decay, base, keys, values, log_decays, cursor, out),
        (
            tokens, heads, heads // q.shape[2], heads // k.shape[2], heads // v.shape[2],
            heads // log_decay.shape[-1] if log_decay is not None else 1, scale, keep,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sg,
        ),
        (
            width_k, width_v, tuning.block_of(width_k), config.block_v, buffer, tuning.block_of(buffer),
            rows, 0 if tokens == 1 or tokens > 4 else 4, decay, q.dtype == torch.float32, q.dtype == torch.float16,
        ),
        config.warps, 1,
    )  # fmt: skip
    return out
