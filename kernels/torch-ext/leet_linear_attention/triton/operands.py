"""What a pass over time is given, whichever kernel serves it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Operands(NamedTuple):
    """What a pass reads: a, b [B, T, Ha, X] and [B, T, Hb, X], rows and keys; c [B, T, Hc, Y], values; unit last
    strides; log_decay None, [H] or [B, T, H] float32; cu_seqlens None or [N + 1]."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    log_decay: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


class Segments(NamedTuple):
    """How a pass is cut in time. starts: where segments start from, [N, H, number, X * Y] float32; None for one."""

    number: int
    length: int
    starts: torch.Tensor | None = None


class ChunkStates(NamedTuple):
    """Where the states that meet the chunks of C tokens lie, [X, Y] each.

    Without ``near`` in states [slots, H, X, Y], a slot for each chunk. With it, those of whole chunks lie in memory
    that is needed later: near [B, T, H, Y] and far [B, T, H, X], row x < C of the state in the chunk's x-th token of
    near, row C + x in that of far. states [sequences, H, X, Y] then holds those of chunks that a sequence's end cuts
    short.
    """

    states: torch.Tensor
    near: torch.Tensor | None = None
    far: torch.Tensor | None = None


class Terms(NamedTuple):
    """What the gradient of log_decay takes of the pass for the gradient of k.

    keys: k [B, T, Hk, Y]. out: [2, tiles, B, T, H] float32.
    """

    keys: torch.Tensor
    out: torch.Tensor
