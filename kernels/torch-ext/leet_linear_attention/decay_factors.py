"""Decay between the tokens of a chunk, and between them and the states at its ends, for the chunkwise torch form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import Chunking

# exp() of less is exactly 0 in the type; clamping keeps one huge log_decay from drowning the others in a running sum.
FLOOR = {torch.float32: -200.0, torch.float64: -800.0}


def rounded_in_turns(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` (float64) in `dtype`, rounded down or up so that along the first dimension the errors cancel.

    A state is multiplied by a chunk's decay again and again. Rounded to nearest, equal factors all err to one side,
    and over hundreds of chunks that costs fp32 a digit.
    """
    if dtype == torch.float64:
        return exact
    infinity = torch.full((), float("inf"), dtype=dtype, device=exact.device)
    below = exact.to(dtype)
    below = torch.where(below > exact, torch.nextafter(below, -infinity), below)
    above = torch.nextafter(below, infinity)
    part = (exact - below) / (above.double() - below)
    sum_of_parts = part.cumsum(0) + 0.5
    return torch.where(sum_of_parts.floor() > (sum_of_parts - part).floor(), above, below)


@dataclass
class ChunkDecay:
    """Decay factors of a run of chunks; every tensor broadcasts to `[n, B, H, ...]`."""

    pair: Tensor  # [.., c, c]  from key i (column) to query t (row), 0 where i > t
    query: Tensor  # [.., c, 1]  from the entering state to query t
    key: Tensor  # [.., c, 1]  from key i to the end of the chunk
    whole: Tensor  # [n, .., 1, 1]  over the whole chunk


class DecayFactors:
    """Makes `ChunkDecay`s from log_decay None, `[h]` or `[B, T, h]`.

    Log-decays are summed and subtracted in float64, where that is exact enough however much they differ, and only the
    differences, all <= 0, are rounded to the working type.
    """

    def __init__(self, log_decay: Tensor | None, heads: int, chunking: Chunking, dtype: torch.dtype) -> None:
        self.heads, self.chunking, self.dtype = heads, chunking, dtype
        self.per_token = None
        if log_decay is None:
            log_decay = torch.zeros(1, dtype=torch.float64, device=chunking.device)
        log_decay = log_decay.to(torch.float64).clamp_min(FLOOR[dtype])
        if log_decay.dim() == 3:
            self.per_token = log_decay.unsqueeze(-1)
            return
        if log_decay.numel() not in (1, heads):
            log_decay = log_decay.repeat_interleave(heads // log_decay.numel())
        self.per_head = log_decay[:, None, None]
        rows = chunking.rows[:, None]
        self.pair = self._factor(self.per_head * chunking.steps).tril_()
        self.query = self._factor(self.per_head * (rows + 1))
        self.key_of_full_chunk = self._factor(self.per_head * (chunking.chunk - 1 - rows))
        lengths = chunking.lengths[:, None, None, None, None]
        self.whole = rounded_in_turns((self.per_head * lengths).exp(), self.dtype)

    def of(self, lo: int, hi: int) -> ChunkDecay:
        """Factors of chunks lo to hi. Padding does not decay."""
        cut = self.chunking
        if self.per_token is None:
            key = self.key_of_full_chunk
            if not cut.without_padding(lo, hi):
                key = self._factor(self.per_head * cut.remaining(lo, hi)[:, None, None, :, None])
            return ChunkDecay(self.pair, self.query, key, self.whole[lo:hi])
        batch, _, heads, _ = self.per_token.shape
        running = self.per_token.new_empty(hi - lo, batch, heads, cut.chunk, 1)
        running = cut.take(self.per_token, lo, hi, running).cumsum_(3)
        if running.shape[2] != self.heads:
            running = running.repeat_interleave(self.heads // running.shape[2], dim=2)
        end = running[..., -1:, :]
        # Above the diagonal the difference is positive: taken away before exp can overflow.
        pair = self._factor((running - running.transpose(-1, -2)).clamp_max_(0)).tril_()
        whole = rounded_in_turns(end.exp(), self.dtype)
        return ChunkDecay(pair, self._factor(running), self._factor(end - running), whole)

    def _factor(self, log: Tensor) -> Tensor:
        return log.to(self.dtype).exp()
