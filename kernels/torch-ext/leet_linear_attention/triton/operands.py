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


class Terms(NamedTuple):
    """What the gradient of log_decay takes of the pass for the gradient of k.

    keys: k [B, T, Hk, Y]. out: [2, tiles, B, T, H] float32.
    """

    keys: torch.Tensor
    out: torch.Tensor
