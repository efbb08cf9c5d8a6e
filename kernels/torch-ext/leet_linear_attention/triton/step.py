"""One launch of the buffered decode step: outputs, the buffer's new entries, and its folding when it is full.

``step_kernel`` serves one token, which is too few rows for the matrix units; several are ``step_rows``'s.

Every program holds some tiles of columns of one head's base state, one after another, and the next is on its way while
one is worked on. The state is written only when the buffer folds, once in ``buffer`` tokens, so a step reads the state
and little else; one that folds takes its outputs from the folded state, so that it reads the state once, too. The
cursor (start, count) is read by all programs and advanced by whichever finishes last, which the ticket beside it
decides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..torch_step import step as torch_step
from . import tuning
from .common import wait_for_inputs
from .launcher import Launcher, aligned_strides, device_index
from .ring import (
    buffered_tokens,
    first_tile,
    move_cursor,
    number_folded,
    part_of_head,
    tiles_of_program,
    tiles_stepped,
)
from .step_rows import rows_kernel


@triton.jit(
    do_not_specialize=[
        "H", "group_q", "group_k", "group_v", "group_g", "keep", "tiles",
        "sqb", "sqh", "skb", "skh", "svb", "svh", "sgb", "sgh",
    ]
)  # fmt: skip
def step_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, base_ptr, keys_ptr, values_ptr, decays_ptr, cursor_ptr, out_ptr,
    H, group_q, group_k, group_v, group_g, scale, keep, tiles, sqb, sqh, skb, skh, svb, svh, sgb, sgh,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
    DECAY: tl.constexpr, ALIGN: tl.constexpr, IS_FP32: tl.constexpr, IS_FP16: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * blocks of ``tiles`` tiles of BV columns,), blocks fastest. N <= BN. Ring: ``ring``."""
    R: tl.constexpr = 2 * N
    i_bh, first, behind = tiles_of_program(tiles, V, BV)
    i_b = i_bh // H
    i_h = i_bh % H
    wait_for_inputs(OVERLAP)
    start = tl.load(cursor_ptr)
    count = tl.load(cursor_ptr + 1)

    key = tl.arange(0, BK)
    mask_k = key < K
    base_ptr, keys_ptr, values_ptr, decays_ptr, stride_k, stride_v = part_of_head(
        base_ptr, keys_ptr, values_ptr, decays_ptr, i_bh, H, group_k, group_v, K, V, R
    )
    base_rows, S = first_tile(base_ptr, key, mask_k, first, V, BV)

    # Strides come divided by ALIGN: the product tells the compiler that loads may be 16 bytes wide.
    q_ptr += (i_b * sqb + (i_h // group_q) * sqh) * ALIGN
    k_ptr += (i_b * skb + (i_h // group_k) * skh) * ALIGN
    v_ptr += (i_b * svb + (i_h // group_v) * svh) * ALIGN
    if DECAY == 0:
        g = tl.zeros((), dtype=tl.float32)
    elif DECAY == 1:
        g = tl.load(g_ptr + i_h // group_g)
    else:
        g = tl.load(g_ptr + i_b * sgb + (i_h // group_g) * sgh)
    q = tl.load(q_ptr + key, mask=mask_k, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + key, mask=mask_k, other=0.0)

    slot, held, kb, gb, Gb, Gb_all = buffered_tokens(
        keys_ptr, decays_ptr, start, count, key, mask_k, stride_k, H, BN, R, IS_FP32
    )

    among = tl.sum(k.to(tl.float32) * q, 0)
    before = tl.sum(kb.to(tl.float32) * q[None, :], 1) * tl.exp((Gb_all - Gb + g).to(tl.float32))
    before = tl.where(held, before, 0.0)
    to_row = tl.exp((Gb_all + g).to(tl.float32))

    # The new token's slot lies behind the buffered ones: 2 N of them, so none that is read in this launch is written.
    at = (start + count) % R
    row = tl.zeros((1, 1), dtype=tl.int32)
    v_rows = v_ptr + row
    buffered_rows = values_ptr + (slot * stride_v)[:, None]
    new_rows = values_ptr + at * stride_v + row
    out_rows = out_ptr + i_bh * V + row
    new = row == 0
    given = row == i_h % group_v  # by the first of the heads that share values
    # The oldest tokens are folded where the new one finds no room.
    folded = number_folded(count, 1, keep, N)
    tiles_stepped(
        S, first, behind, base_rows, v_rows, buffered_rows, new_rows, out_rows, mask_k[:, None], new,
        held[:, None], given, q, among, before, to_row, g, kb, gb, Gb, Gb_all, scale, folded,
        base_ptr, keys_ptr, values_ptr, decays_ptr, start, stride_k, stride_v, H,
        K, V, BK, BV, BN, R, True, IS_FP32, IS_FP16,
    )  # fmt: skip

    if first == 0:
        tl.store(decays_ptr + at * H, g)
        if i_h % group_k == 0:
            tl.store(keys_ptr + at * stride_k + key, k, mask=mask_k)

    move_cursor(cursor_ptr, start + folded, count - folded + 1, R)


_step, _rows = Launcher(step_kernel, overlaps=True), Launcher(rows_kernel, overlaps=True)


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
    index = device_index(q)
    config = tuning.step_config(width_k, width_v, tokens, buffer, q.element_size(), index)
    if config is None:
        # Wide windows for taking back tokens; the torch form serves any size, and reads the cursor on the host.
        return torch_step(q, k, v, log_decay, base, keys, values, log_decays, cursor, scale, buffer, keep)
    tensors = (q, k, v, log_decay, base, keys, values, log_decays, cursor, out)
    decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
    group_g = 1 if log_decay is None else heads // log_decay.shape[-1]
    groups = (heads // q.shape[2], heads // k.shape[2], heads // v.shape[2], group_g)
    align, strides = aligned_strides(q, k, v)
    strides += log_decay.stride() if log_decay is not None and decay == 2 else (0, 0, 0)
    sizes = (width_k, width_v, tuning.block_of(width_k), config.block_v, buffer, config.held)
    kinds = (decay, align, q.dtype == torch.float32, q.dtype == torch.float16)
    options = (config.warps, 1, config.registers)  # loads run ahead by themselves
    tiles = tuning.blocks(width_v, config.block_v)
    together = tuning.step_tiles(config, tiles, batch * heads, index)
    grid = (tuning.blocks(tiles, together) * batch * heads,)
    numbers = (heads, *groups, scale, keep, together)
    if tokens == 1:
        ahead = [stride for place, stride in enumerate(strides) if place % 3 != 1]
        _step(grid, index, tensors, (*numbers, *ahead), (*sizes, *kinds), *options)
    else:
        _rows(grid, index, tensors, (tokens, *numbers, *strides), (*sizes, config.rows, *kinds), *options)
    return out
