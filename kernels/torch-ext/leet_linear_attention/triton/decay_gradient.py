"""Gradient of log_decay, chunk by chunk, from what the sweep for the gradient of k has in its hands.

dg_t sums W_ij = scale exp(G_j - G_i) (q_j . k_i)(do_j . v_i) over the pairs i < t <= j that the decay of token t lies
between. The common form, a running sum of q.dq - k.dk, contains the pairs i = j, which no decay touches, and gathers
the rounding of every later token; here each kind of pair is summed by itself and nothing cancels but equal numbers:
both in the chunk; i before it; j behind it; i before and j behind. The sweep holds the gradient that reaches the state
from behind and reads the states from before, which the sweep for the gradient of q leaves behind. Every sum is linear
in the tile of the state, so tiles give parts that add up; ``chunk_terms`` gives those of one tile and chunk, and
``decay_gradient_kernel`` adds them and runs over the tokens of each chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shapes import sequence_count
from . import tuning
from .common import dot, dot_narrow
from .launcher import Launcher, device_index


@triton.jit
def chunk_terms(A, do, q, k, behind, R, S, to_query, to_chunk_end, last, C: tl.constexpr, IS_FP16: tl.constexpr):
    """(passing, ending), [C] each, over scale: dg_t = sum of passing from t on, and of ending before t, in the chunk.

    A [C, C]: D_ij (v_i . do_j), 0 for j < i. do [C, BV], q and k [C, BK]. behind [C, BK]: decay from i to the chunk's
    end times v_i^T R. R and S [BV, BK]: the gradient behind the chunk, the state before it. to_query [C]: decay from
    the chunk's start to j. to_chunk_end: decay over the chunk. last: place of the chunk's last token.
    """
    r = tl.arange(0, C)
    crossing = tl.sum(tl.sum(R * S.to(tl.float32), 1), 0) * to_chunk_end
    passing = tl.sum(dot_narrow(do, S, IS_FP16) * q.to(tl.float32), 1) * to_query
    passing += tl.where(r == last, crossing, 0.0)
    # Pairs with i < t <= j are those with j >= t less those with i >= t: the same W in both, so the rest is exact.
    W = tl.where(r[:, None] < r[None, :], A * dot(k, tl.trans(q)), 0.0)
    passing += tl.sum(W, 0) - tl.sum(W, 1)
    return passing, tl.sum(behind * k.to(tl.float32), 1)


@triton.jit(do_not_specialize=["T", "rows", "H", "n_tiles"])
def decay_gradient_kernel(
    terms_ptr, dg_ptr, cu_ptr, T, rows, H, n_tiles, scale, C: tl.constexpr, BH: tl.constexpr, PACKED: tl.constexpr
):
    """Grid (sequences * chunks, blocks of BH heads). terms [2, tiles, B, T, H] -> dg [B, T, H]."""
    n_chunks = tl.cdiv(T, C)
    i_n = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_c = tl.program_id(0) % n_chunks
    if PACKED:
        bos = tl.load(cu_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_ptr + i_n + 1).to(tl.int64) - bos).to(tl.int32)
    else:
        bos = i_n * T
        length = T
    n_valid = length - i_c * C
    if n_valid > 0:
        r = tl.arange(0, C)
        h = tl.program_id(1) * BH + tl.arange(0, BH)
        at = (bos + i_c * C + r)[:, None] * H + h[None, :]
        mask = (r < n_valid)[:, None] & (h < H)[None, :]
        first = (r > 0)[:, None]
        passing = tl.zeros((C, BH), dtype=tl.float32)
        ended = tl.zeros((C, BH), dtype=tl.float32)
        for i in range(0, n_tiles):
            part = terms_ptr + i * rows.to(tl.int64) * H
            passing += tl.load(part + at, mask=mask, other=0.0)
            # of the token before, as its own column does not count: a difference of running sums would bury the rest
            ended += tl.load(part + n_tiles * rows.to(tl.int64) * H + at - H, mask=mask & first, other=0.0)
        dg = tl.cumsum(passing, 0, reverse=True) + tl.cumsum(ended, 0)
        tl.store(dg_ptr + at, dg * scale, mask=mask)


_decay_gradient = Launcher(decay_gradient_kernel)


def decay_gradient(
    terms: torch.Tensor, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None, scale: float, chunk: int
) -> torch.Tensor:
    """dlog_decay, in log_decay's shape, from the terms [2, tiles, B, T, H] that a sweep with this chunk has left."""
    _, tiles, batch, tokens, heads = terms.shape
    dg = terms.new_empty((batch, tokens, heads))
    block = min(32, tuning.block_of(heads))
    sequences = sequence_count(terms[0, 0], cu_seqlens)
    _decay_gradient(
        (sequences * tuning.blocks(tokens, chunk), tuning.blocks(heads, block)), device_index(terms),
        (terms, dg, cu_seqlens), (tokens, batch * tokens, heads, tiles, scale), (chunk, block, cu_seqlens is not None),
        4, 1,
    )  # fmt: skip
    if log_decay.dim() == 1:
        dg = dg.sum((0, 1), dtype=torch.float64).to(log_decay.dtype)
    groups = log_decay.shape[-1]
    return dg if groups == heads else dg.unflatten(-1, (groups, -1)).sum(-1)
