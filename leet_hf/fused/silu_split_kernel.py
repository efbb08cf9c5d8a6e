"""The gradient of SiLU over a packed projection, from those of its parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leet_linear_attention.triton.launch import Plans, form_of
from leet_linear_attention.triton.launcher import Launch, Launcher, aligned_strides, device_index

from .glu_kernel import activated


@triton.jit(
    do_not_specialize=["T", "H", "sxb", "sxt", "sxh", "sqb", "sqt", "sqh", "skb", "skt", "skh", "svb", "svt", "svh"]
)
def silu_split_backward_kernel(
    x_ptr, dq_ptr, dk_ptr, dv_ptr, dx_ptr,
    T, H, sxb, sxt, sxh, sqb, sqt, sqh, skb, skt, skh, svb, svt, svh,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (B * T * blocks of heads,), blocks fastest. Strides over ALIGN; dx [B, T, H, 3 D] contiguous."""
    blocks = tl.cdiv(H, BH)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    b, t = token // T, token % T
    head = ((tl.program_id(0) % blocks) * BH + tl.arange(0, BH)[:, None]).to(tl.int64)  # heads may lie far apart
    i = tl.arange(0, BD)[None, :]
    mask = (head < H) & (i < D)
    x_ptr += (b * sxb + t * sxt) * ALIGN
    dx_ptr += token * H * 3 * D
    for part in tl.static_range(3):
        if part == 0:
            dy_at = dq_ptr + (b * sqb + t * sqt) * ALIGN + head * (sqh * ALIGN) + i
        elif part == 1:
            dy_at = dk_ptr + (b * skb + t * skt) * ALIGN + head * (skh * ALIGN) + i
        else:
            dy_at = dv_ptr + (b * svb + t * svt) * ALIGN + head * (svh * ALIGN) + i
        dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + head * (sxh * ALIGN) + part * D + i, mask=mask, other=0.0).to(tl.float32)
        _, slope = activated(x, False)
        tl.store(dx_ptr + head * (3 * D) + part * D + i, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)


_launcher, _plans = Launcher(silu_split_backward_kernel), Plans()
ENTRIES_A_PROGRAM = 1024


def silu_split_backward(packed: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> torch.Tensor:
    """The gradient of packed [B, T, H * 3 * D], contiguous; dq, dk, dv [B, T, H, D]; all with unit last stride."""
    dx = packed.new_empty(packed.shape)
    if dx.numel():
        x = packed.unflatten(-1, (dq.shape[2], 3 * dq.shape[3]))
        key = (device_index(x), form_of(x, dq, dk, dv))
        _plans.of(key, lambda: _launch(x, dq, dk, dv))(x, dq, dk, dv, dx)
    return dx


def _launch(x: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> Launch:
    batch, tokens, heads, dim = dq.shape
    block_d = triton.next_power_of_2(dim)
    block_h = max(min(ENTRIES_A_PROGRAM // block_d, triton.next_power_of_2(heads)), 1)
    align, strides = aligned_strides(x, dq, dk, dv)
    grid = (batch * tokens * triton.cdiv(heads, block_h),)
    return Launch(_launcher, grid, device_index(x), (tokens, heads, *strides), (dim, block_h, block_d, align), 4, 1)
