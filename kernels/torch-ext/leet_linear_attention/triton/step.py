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
from .common import decayed, dot, dot_narrow, narrow_dot, wait_for_inputs
from .launcher import Launcher, aligned_strides, device_index


@triton.jit
def wide_sum(g, PRECISE: tl.constexpr):
    """Running sum and total of log_decays, in float64 where PRECISE."""
    if PRECISE:
        g = g.to(tl.float64)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def fold(
    base_ptr, keys_ptr, values_ptr, decays_ptr, start, folded, value, stride_k, stride_v, stride_g,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, IS_FP32: tl.constexpr,
):  # fmt: skip
    """Take the ``folded`` oldest tokens into the columns ``value`` of a head's base state, to float32's accuracy.

    Some rows at a time, read again: registers that only a fold needs would be missing in every step.
    """
    ROWS: tl.constexpr = 32
    TOKENS: tl.constexpr = 16
    n = tl.arange(0, TOKENS)
    mask_v = value < V
    for first in range(0, K, ROWS):
        key = first + tl.arange(0, ROWS)
        mask_k = key < K
        at = base_ptr + key[:, None] * V + value[None, :]
        mask = mask_k[:, None] & mask_v[None, :]
        S = tl.load(at, mask=mask, other=0.0)
        for block in range(0, folded, TOKENS):
            old = block + n < folded
            slot = (start + block + n) % R
            g = tl.load(decays_ptr + slot * stride_g, mask=old, other=0.0)
            G, G_all = wide_sum(g, IS_FP32)
            k = tl.load(
                keys_ptr + (slot * stride_k)[None, :] + key[:, None], mask=old[None, :] & mask_k[:, None], other=0.0
            )
            v = tl.load(
                values_ptr + (slot * stride_v)[:, None] + value[None, :], mask=old[:, None] & mask_v[None, :], other=0.0
            )
            v = v.to(tl.float32) * tl.exp((G_all - G).to(tl.float32))[:, None]
            S = decayed(S, G_all)
            # Keys of 16 bits are exact in TF32, so three products of TF32 parts lose nothing.
            S += tl.dot(k.to(tl.float32), v, input_precision="ieee" if IS_FP32 else "tf32x3")
        tl.store(at, S, mask=mask)


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
    BT: tl.constexpr, DECAY: tl.constexpr, ALIGN: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of V,), blocks fastest. T <= BT and N <= BN.

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
    wait_for_inputs(OVERLAP)
    start = tl.load(cursor_ptr)
    count = tl.load(cursor_ptr + 1)

    key = tl.arange(0, BK)
    value = i_v * BV + tl.arange(0, BV)
    mask_k = key < K
    mask_v = value < V
    base_ptr += i_bh * K * V
    mask_s = mask_k[:, None] & mask_v[None, :]
    S = tl.load(base_ptr + key[:, None] * V + value[None, :], mask=mask_s, other=0.0)

    # This head's part of the ring, and its new tokens. Strides come divided by ALIGN: the product tells the compiler
    # that loads may be 16 bytes wide.
    keys_ptr += (i_b * R * heads_k + h_k) * K
    values_ptr += (i_b * R * heads_v + h_v) * V
    decays_ptr += i_b * R * H + i_h
    sqt *= ALIGN
    skt *= ALIGN
    svt *= ALIGN
    q_ptr += (i_b * sqb + (i_h // group_q) * sqh) * ALIGN
    k_ptr += (i_b * skb + h_k * skh) * ALIGN
    v_ptr += (i_b * svb + h_v * svh) * ALIGN
    out_ptr += (i_b * T * H + i_h) * V

    t = tl.arange(0, BT)
    new = t < T
    if DECAY == 0:
        g = tl.zeros((BT,), dtype=tl.float32)
    elif DECAY == 1:
        g = tl.where(new, tl.load(g_ptr + i_h // group_g), 0.0)
    else:
        g = tl.load(g_ptr + i_b * sgb + t * sgt + (i_h // group_g) * sgh, mask=new, other=0.0)
    tile_k = new[:, None] & mask_k[None, :]
    tile_v = new[:, None] & mask_v[None, :]
    k = tl.load(k_ptr + (t * skt)[:, None] + key[None, :], mask=tile_k, other=0.0)
    v = tl.load(v_ptr + (t * svt)[:, None] + value[None, :], mask=tile_v, other=0.0)
    G, G_now = wide_sum(g, IS_FP32)

    # Buffered tokens, oldest first.
    n = tl.arange(0, BN)
    slot = (start + n) % R
    held = n < count
    kb = tl.load(
        keys_ptr + (slot * heads_k * K)[:, None] + key[None, :], mask=held[:, None] & mask_k[None, :], other=0.0
    )
    vb = tl.load(
        values_ptr + (slot * heads_v * V)[:, None] + value[None, :], mask=held[:, None] & mask_v[None, :], other=0.0
    )
    Gb, Gb_all = wide_sum(tl.load(decays_ptr + slot * H, mask=held, other=0.0), IS_FP32)
    if BT == 1:
        # Too few rows for the matrix units.
        q = tl.load(q_ptr + key, mask=mask_k, other=0.0).to(tl.float32)
        w_b = tl.sum(kb.to(tl.float32) * q[None, :], 1) * tl.exp((Gb_all - Gb + G_now).to(tl.float32))
        w = tl.sum(k.to(tl.float32) * q[None, :], 1)
        o = tl.sum(q[:, None] * S, 0) * tl.exp((Gb_all + G_now).to(tl.float32))
        o += tl.sum(tl.where(held, w_b, 0.0)[:, None] * vb.to(tl.float32), 0)
        o += tl.sum(w[:, None] * v.to(tl.float32), 0)
        tl.store(out_ptr + value, (o * scale).to(out_ptr.dtype.element_ty), mask=mask_v)
    else:
        q = tl.load(q_ptr + (t * sqt)[:, None] + key[None, :], mask=tile_k, other=0.0)
        o = dot_narrow(q, S, IS_FP16) * tl.exp((G + Gb_all).to(tl.float32))[:, None]
        causal = t[:, None] >= t[None, :]
        A = dot(q, tl.trans(k)) * tl.exp(tl.where(causal, G[:, None] - G[None, :], 0.0).to(tl.float32))
        o += narrow_dot(tl.where(causal, A, 0.0), v, IS_FP16)
        A = dot(q, tl.trans(kb)) * tl.exp((G[:, None] + (Gb_all - Gb)[None, :]).to(tl.float32))
        o += narrow_dot(tl.where(held[None, :], A, 0.0), vb, IS_FP16)
        tl.store(out_ptr + (t * H * V)[:, None] + value[None, :], (o * scale).to(out_ptr.dtype.element_ty), mask=tile_v)

    # Fold the oldest tokens where the new ones find no room.
    folded = count * 0
    if count + T > N:
        folded = tl.minimum(count, count + T - tl.maximum(keep, T))
    if folded > 0:
        fold(
            base_ptr, keys_ptr, values_ptr, decays_ptr, start, folded, value, heads_k * K, heads_v * V, H, K, V, BV, R,
            IS_FP32,
        )  # fmt: skip

    # Append. Slots behind the buffered ones: 2 N of them, so none that is read in this launch is written.
    at = (start + count + t) % R
    if i_h % group_v == 0:
        tl.store(values_ptr + (at * heads_v * V)[:, None] + value[None, :], v, mask=tile_v)
    if i_v == 0:
        tl.store(decays_ptr + at * H, g, mask=new)
        if i_h % group_k == 0:
            tl.store(keys_ptr + (at * heads_k * K)[:, None] + key[None, :], k, mask=tile_k)

    # The last program of the launch moves the cursor: by then every other has read it.
    if tl.atomic_add(cursor_ptr + 2, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(cursor_ptr, (start + folded) % R)
        tl.store(cursor_ptr + 1, count - folded + T)
        tl.store(cursor_ptr + 2, 0)


_step = Launcher(step_kernel, overlaps=True)


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
    rows = 1 if tokens == 1 else tuning.block_of(tokens)
    held = tuning.block_of(buffer)
    config = tuning.step_config(width_k, width_v, rows)
    if not tuning.step_fits(rows, held, width_k, config.block_v, q.element_size(), device_index(q)):
        # Wide windows for taking back tokens; the torch form serves any size, and reads the cursor on the host.
        return torch_step(q, k, v, log_decay, base, keys, values, log_decays, cursor, scale, buffer, keep)
    align, strides = aligned_strides(q, k, v)
    _step(
        (tuning.blocks(width_v, config.block_v) * batch * heads,), device_index(q),
        (q, k, v, log_decay, base, keys, values, log_decays, cursor, out),
        (
            tokens, heads, heads // q.shape[2], heads // k.shape[2], heads // v.shape[2],
            heads // log_decay.shape[-1] if log_decay is not None else 1, scale, keep,
            *strides, *sg,
        ),
        (
            width_k, width_v, tuning.block_of(width_k), config.block_v, buffer, held, rows, decay, align,
            q.dtype == torch.float32, q.dtype == torch.float16,
        ),
        config.warps, 1, config.registers,
    )  # fmt: skip
    return out
