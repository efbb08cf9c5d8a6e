"""Host side of the sweep: shapes, strides, segments and the launches of one pass over time."""

from __future__ import annotations

import torch
import triton

from ..shapes import sequence_count
from . import tuning
from .launcher import Launcher, device_index
from .sweep import scan_kernel, sweep_kernel

_Optional = torch.Tensor | None
_sweep, _scan = Launcher(sweep_kernel), Launcher(scan_kernel)


def chunk_slots(tokens: int, sequences: int, batch: int, chunk: int, packed: bool) -> int:
    """Places for one state per chunk: packed sequences need at most one extra each."""
    return tokens // chunk + sequences if packed else batch * triton.cdiv(tokens, chunk)


def aligned_strides(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(A, strides of the first three dimensions over A): A elements are 16 bytes if every stride allows it, else 1."""
    strides = [s for x in tensors for s in x.stride()[:3]]
    align = 16 // tensors[0].element_size()
    if any(s % align for s in strides):
        return 1, strides
    return align, [s // align for s in strides]


def sweep(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    log_decay: torch.Tensor | None,
    heads: int,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    transposed: bool = False,
    final: bool = False,
    chunk_states: torch.Tensor | None = None,
    config: tuning.SweepConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One pass over time.

    Args:
        a, b: [B, T, Ha, X] and [B, T, Hb, X], rows and keys (unit last stride).
        c: [B, T, Hc, Y], values.
        log_decay: None, [H] or [B, T, H] float32.
        heads: H.
        state: where the pass starts (its end, if ``reverse``), [N, H, X, Y] float32 contiguous, or None.
        cu_seqlens: [N + 1] or None.
        transposed: states in memory are [Y, X], as when keys and values have exchanged their places.
        final: whether the last state is wanted back.
        chunk_states: [slots, H, X, Y] receives the state that meets each chunk.
        config: block shapes other than the table's.

    Returns:
        [B, T, H, Y] in a's dtype; the last state [N, H, X, Y] (or [N, H, Y, X]) float32, or None.
    """
    batch, tokens, _, width_x = a.shape
    width_y = c.shape[-1]
    index = device_index(a)
    if config is None:
        config = tuning.sweep_config(width_x, width_y, a.element_size(), index)
    sequences = sequence_count(a, cu_seqlens)
    programs = triton.cdiv(width_y, config.block_y) * sequences * heads
    count, length = 1, tokens
    if cu_seqlens is None and chunk_states is None:
        count, length = tuning.segments(tokens, config.chunk, programs, index)

    out = a.new_empty(batch, tokens, heads, width_y)
    shape = (sequences, heads, width_y, width_x) if transposed else (sequences, heads, width_x, width_y)
    state_out = a.new_empty(shape, dtype=torch.float32) if final else None
    ssx, ssy = (1, width_x) if transposed else (width_y, 1)
    decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
    sg = log_decay.stride() if log_decay is not None and decay == 2 else (0, 0, 0)
    group_g = heads // log_decay.shape[-1] if log_decay is not None else 1
    groups = (heads // a.shape[2], heads // b.shape[2], heads // c.shape[2], group_g)
    align, strides = aligned_strides(a, b, c)
    numbers = (tokens, length, count, heads, *groups, scale, *strides, *sg, ssx, ssy)

    def launch(s_in: _Optional, s_out: _Optional, g_sum: _Optional, with_out: bool) -> None:
        _sweep(
            (programs * count,), index,
            (a, b, c, log_decay, out, s_in, s_out, g_sum, chunk_states, cu_seqlens), numbers,
            (
                width_x, width_y, config.chunk, tuning.block_of(width_x), config.block_y, decay, reverse,
                cu_seqlens is not None, align, with_out, s_in is not None, s_out is not None,
                chunk_states is not None, g_sum is not None,
                a.dtype == torch.float32, a.dtype == torch.float16,
            ),
            config.warps, config.stages,
        )  # fmt: skip

    if programs == 0:
        return out, state_out
    if count == 1:
        launch(state, state_out, None, True)
        return out, state_out
    # Every segment's own end state, the scan over them, and then the outputs from where each segment starts.
    states = a.new_empty((sequences, heads, count, width_x * width_y), dtype=torch.float32)
    g_sum = a.new_empty((sequences, heads, count), dtype=torch.float64)
    launch(None, states, g_sum, False)
    block = 1024
    _scan(
        (sequences * heads, triton.cdiv(width_x * width_y, block)), index,
        (states, g_sum, state, state_out), (count, width_x * width_y), (reverse, state is not None, final, block), 4, 1,
    )  # fmt: skip
    launch(states, None, None, True)
    return out, state_out
