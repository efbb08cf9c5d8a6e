"""Host side of the sweep: shapes, strides, segments and the launches of one pass over time."""

from __future__ import annotations

import torch
import triton

from ..shapes import sequence_count
from . import tuning
from .sweep import scan_kernel, sweep_kernel


def device_index(x: torch.Tensor) -> int:
    """CUDA device number, or -1 in Triton's interpreter on the CPU."""
    return x.device.index if x.is_cuda else -1


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
    twin: torch.Tensor | None = None,
    chunk_states: torch.Tensor | None = None,
    config: tuning.SweepConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """One pass over time, or with ``twin`` two that read the same b and c.

    Args:
        a, b: [B, T, Ha, X] and [B, T, Hb, X], rows and keys (unit last stride).
        c: [B, T, Hc, Y], values.
        log_decay: None, [H] or [B, T, H] float32.
        heads: H.
        state: where the pass starts (its end, if ``reverse``), [N, H, X, Y] float32 contiguous, or None.
        cu_seqlens: [N + 1] or None.
        transposed: states in memory are [Y, X], as when keys and values have exchanged their places.
        final: whether the last state is wanted back.
        twin: [B, T, Ha2, X], the rows of a second pass with b and c exchanged (X = Y), its state transposed.
        chunk_states: [slots, H, ...] receives the state that meets each chunk.
        config: block shapes other than the table's.

    Returns:
        [B, T, H, Y] in a's dtype; the last state [N, H, X, Y] (or [N, H, Y, X]) float32, or None; the twin's, or None.
    """
    batch, tokens, _, width_x = a.shape
    width_y = c.shape[-1]
    index = device_index(a)
    if config is None:
        config = tuning.sweep_config(width_x, width_y, a.element_size(), index)
    sequences = sequence_count(a, cu_seqlens)
    passes = 1 if twin is None else 2
    programs = triton.cdiv(width_y, config.block_y) * passes * sequences * heads
    count, length = 1, tokens
    if cu_seqlens is None and chunk_states is None:
        count, length = tuning.segments(tokens, config.chunk, programs, index)

    out = a.new_empty(batch, tokens, heads, width_y)
    out_twin = torch.empty_like(out) if twin is not None else None
    shape = (sequences, heads, width_y, width_x) if transposed else (sequences, heads, width_x, width_y)
    state_out = a.new_empty(shape, dtype=torch.float32) if final else None
    ssx, ssy = (1, width_x) if transposed else (width_y, 1)
    decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
    sg = log_decay.stride() if log_decay is not None and decay == 2 else (0, 0, 0)
    group_g = heads // log_decay.shape[-1] if log_decay is not None else 1
    rows = a if twin is None else twin
    groups = (heads // a.shape[2], heads // b.shape[2], heads // c.shape[2], group_g, heads // rows.shape[2])
    align, strides = aligned_strides(rows, a, b, c)

    def launch(  # type: ignore[no-untyped-def]
        s_in, s_out, g_sum, with_out: bool, with_twin: bool
    ) -> None:
        sweep_kernel[(programs // passes * (2 if with_twin else 1) * count,)](
            a, b, c, twin, log_decay, out, out_twin, s_in, s_out, g_sum, chunk_states, cu_seqlens,
            tokens, length, count, heads, *groups, scale, *strides, *sg, ssx, ssy,
            X=width_x, Y=width_y, C=config.chunk, BX=tuning.block_of(width_x), BY=config.block_y,
            DECAY=decay, REVERSE=reverse, PACKED=cu_seqlens is not None, ALIGN=align,
            HAS_OUT=with_out, HAS_S_IN=s_in is not None, HAS_S_OUT=s_out is not None,
            HAS_CHUNKS=chunk_states is not None, SEGMENTED=g_sum is not None, PAIR=with_twin,
            IS_FP32=a.dtype == torch.float32, IS_FP16=a.dtype == torch.float16,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    if programs == 0:
        return out, state_out, out_twin
    if count == 1:
        launch(state, state_out, None, True, twin is not None)
        return out, state_out, out_twin
    # Every segment's own end state, the scan over them, and then the outputs from where each segment starts. The twin's
    # states are the same ones, transposed.
    states = a.new_empty((sequences, heads, count, width_x * width_y), dtype=torch.float32)
    g_sum = a.new_empty((sequences, heads, count), dtype=torch.float64)
    launch(None, states, g_sum, False, False)
    block = 1024
    scan_kernel[(sequences * heads, triton.cdiv(width_x * width_y, block))](
        states, g_sum, state, state_out, count, width_x * width_y,
        REVERSE=reverse, HAS_S_IN=state is not None, HAS_S_OUT=final, BLOCK=block,
    )  # fmt: skip
    launch(states, None, None, True, twin is not None)
    return out, state_out, out_twin
