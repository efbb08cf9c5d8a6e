"""Decay between the tokens of a chunk, and between them and the states at its ends, for the chunkwise torch form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import Chunking

# exp() of less is exactly 0 in the type; clamping keeps one huge log_decay from drowning the others in a running sum.
FLOOR = {torch.float32: -200.0, torch.float64: -800.0}


@dataclass
class ChunkDecay:
    """Decay factors of a run of chunks; every tensor broadcasts to `[n, B, H, ...]`."""

    pair: Tensor  # [.., c, c]  from key i (column) to query t (row), 0 where i > t
    query: Tensor  # [.., c, 1]  from the entering state to query t
    key: Tensor  # [.., c, 1]  from key i to the end of the chunk
    whole: Tensor  # [.., 1, 1]  over the whole chunk, float64


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
        # What chunks without padding share.
        self.full = ChunkDecay(
            pair=self._factor(self.per_head * chunking.steps).tril_(),
            query=self._factor(self.per_head * (rows + 1)),
            key=self._factor(self.per_head * (chunking.chunk - 1 - rows)),
            whole=(self.per_head * chunking.chunk).exp(),
        )

    def of(self, lo: int, hi: int) -> ChunkDecay:
        """Factors of chunks lo to hi. Padding does not decay."""
        cut = self.chunking
        if self.per_token is None:
            if cut.without_padding(lo, hi):
                return self.full
            key = self.per_head * cut.remaining(lo, hi)[:, None, None, :, None]
            whole = self.per_head * cut.lengths[lo:hi, None, None, None, None]
            return ChunkDecay(self.full.pair, self.full.query, self._factor(key), whole.exp())
        running = cut.take(self.per_token, lo, hi, torch.float64).cumsum_(3)
        if running.shape[2] != self.heads:
            running = running.repeat_interleave(self.heads // running.shape[2], dim=2)
        end = running[..., -1:, :]
        # Above the diagonal the difference is positive: taken away before exp can overflow.
        pair = self._factor((running - running.transpose(-1, -2)).clamp_max_(0)).tril_()
        return ChunkDecay(pair, self._factor(running), self._factor(end - running), end.exp())

    def _factor(self, log: Tensor) -> Tensor:
        return log.to(self.dtype).exp()
