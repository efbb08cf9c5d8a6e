"""The kernel that turns q and k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leet_linear_attention.triton.common import wait_for_inputs
from leet_linear_attention.triton.launch import Plans, form_of
from leet_linear_attention.triton.launcher import Launch, Launcher, aligned_strides, device_index


@triton.jit
def turn_heads(
    x_ptr, out_ptr, cos_ptr, sin_ptr, first, heads, stride,
    D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PAIRS: tl.constexpr, TWICE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Heads ``first`` to ``first + BH`` of one token: x at a stride a head, out contiguous. BR >= R/2, BK >= D - R."""
    HALF: tl.constexpr = R // 2
    head = (first + tl.arange(0, BH)).to(tl.int64)  # heads may lie far apart
    i = tl.arange(0, BR)
    there, inside = (head < heads)[:, None], i < HALF
    cos1 = tl.load(cos_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptr + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2, sin2 = cos1, sin1
    if TWICE:
        cos2 = tl.load(cos_ptr + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        sin2 = tl.load(sin_ptr + HALF + i, mask=inside, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        sin1, sin2 = -sin2, -sin1
    rows_in, rows_out = x_ptr + (head * stride)[:, None], out_ptr + (head * D)[:, None]
    if PAIRS:
        both = tl.arange(0, 2 * BR)[None, :]
        mask = there & (both < R)
        x = tl.load(rows_in + both, mask=mask, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [BH, BR, 2]))
        out = tl.reshape(tl.join(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2), [BH, 2 * BR])
        tl.store(rows_out + both, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = there & inside[None, :]
        x1 = tl.load(rows_in + i[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(rows_in + HALF + i[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(rows_out + i[None, :], (x1 * cos1 - x2 * sin1).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(rows_out + HALF + i[None, :], (x2 * cos2 + x1 * sin2).to(out_ptr.dtype.element_ty), mask=mask)
    if D > R:
        kept = R + tl.arange(0, BK)[None, :]
        mask = there & (kept < D)
        tl.store(rows_out + kept, tl.load(rows_in + kept, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["T", "Hq", "Hk", "sqb", "sqt", "sqh", "skb", "skt", "skh", "scb", "sct", "ssb", "sst"])
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, out_q_ptr, out_k_ptr,
    T, Hq, Hk, sqb, sqt, sqh, skb, skt, skh, scb, sct, ssb, sst,
    D: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PAIRS: tl.constexpr, TWICE: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGN: tl.constexpr, ALIGN_TABLES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * T * (blocks of q's heads + blocks of k's heads),), blocks fastest. Strides over ALIGN."""
    blocks_q = tl.cdiv(Hq, BH)
    blocks = blocks_q + tl.cdiv(Hk, BH)
    block = tl.program_id(0) % blocks
    token = (tl.program_id(0) // blocks).to(tl.int64)
    b, t = token // T, token % T
    cos_ptr += (b * scb + t * sct) * ALIGN_TABLES
    sin_ptr += (b * ssb + t * sst) * ALIGN_TABLES
    wait_for_inputs(OVERLAP)
    if block < blocks_q:
        turn_heads(
            q_ptr + (b * sqb + t * sqt) * ALIGN, out_q_ptr + token * Hq * D, cos_ptr, sin_ptr,
            block * BH, Hq, sqh * ALIGN, D, R, BH, BR, BK, PAIRS, TWICE, TRANSPOSED,
        )  # fmt: skip
    else:
        turn_heads(
            k_ptr + (b * skb + t * skt) * ALIGN, out_k_ptr + token * Hk * D, cos_ptr, sin_ptr,
            (block - blocks_q) * BH, Hk, skh * ALIGN, D, R, BH, BR, BK, PAIRS, TWICE, TRANSPOSED,
        )  # fmt: skip


_launcher, _plans = Launcher(rotary_kernel, overlaps=True), Plans()
PAIRS_A_PROGRAM = 1024


def turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kind: str, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `leet_hf.fused.rotary.turned`, for checked tensors with unit last stride."""
    out_q, out_k = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() + k.numel():
        key = (device_index(q), kind, transposed, form_of(q, k, cos, sin))
        _plans.of(key, lambda: _launch(q, k, cos, sin, kind, transposed))(q, k, cos, sin, out_q, out_k)
    return out_q, out_k


def _launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kind: str, transposed: bool
) -> Launch:
    batch, tokens, heads_q, dim = q.shape
    heads_k = k.shape[2]
    channels = cos.shape[-1] if kind == "rope_twice" else 2 * cos.shape[-1]
    block_r = max(triton.next_power_of_2(channels // 2), 1)
    block_h = max(min(PAIRS_A_PROGRAM // block_r, triton.next_power_of_2(max(heads_q, heads_k))), 1)
    blocks = triton.cdiv(heads_q, block_h) + triton.cdiv(heads_k, block_h)
    align, strides = aligned_strides(q, k)
    align_tables, of_tables = aligned_strides(cos.expand(batch, -1, -1, -1), sin.expand(batch, -1, -1, -1))
    return Launch(
        _launcher,
        (batch * tokens * blocks,),
        device_index(q),
        (tokens, heads_q, heads_k, *strides, *of_tables[0:2], *of_tables[3:5]),
        (dim, channels, block_h, block_r, triton.next_power_of_2(max(dim - channels, 1)),
         kind == "theta_shift", kind == "rope_twice", transposed, align, align_tables),
        4, 1,
    )  # fmt: skip
