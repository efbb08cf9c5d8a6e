"""Decay factors between the tokens of one sequence, for the torch forms of the named algorithms.

Log-decays are summed in float64 and only differences of sums, all <= 0, are exponentiated: nothing is ever divided by a
power that has underflowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decay_factors import FLOOR, rounded_in_turns


class Decay:
    """Factors in `dtype`, broadcastable to `[B, H, tokens, ...]`, of log_decay None, `[h]` or `[B, T, h]`.

    Spans `a, b` are the tokens a to b - 1; the state entering one does not contain token a yet.
    """

    def __init__(self, log_decay: Tensor | None, heads: int, tokens: int, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.tokens = dtype, device, tokens
        self.absent = log_decay is None
        self.running: Tensor | None = None
        if log_decay is None:
            log_decay = torch.zeros(1, device=device)
        log_decay = log_decay.to(torch.float64).clamp_min(FLOOR[dtype])
        if log_decay.shape[-1] not in (1, heads):
            log_decay = log_decay.repeat_interleave(heads // log_decay.shape[-1], -1)
        if log_decay.dim() == 1:
            self.rate = log_decay[:, None, None]
        else:
            self.running = torch.nn.functional.pad(log_decay.cumsum(1), (0, 0, 1, 0)).transpose(1, 2).unsqueeze(-1)

    def _sums(self, a: int, b: int) -> Tensor:
        """Log-decay from the state entering the span to each token of it, float64 `[.., b - a, 1]`."""
        if self.running is None:
            return self.rate * torch.arange(1, b - a + 1, dtype=torch.float64, device=self.device)[:, None]
        return self.running[:, :, a + 1 : b + 1] - self.running[:, :, a : a + 1]

    def _total(self, a: int, b: int) -> Tensor:
        """Log-decay over the span, float64 `[.., 1, 1]`."""
        if self.running is None:
            return self.rate * (b - a)
        return self.running[:, :, b : b + 1] - self.running[:, :, a : a + 1]

    def pairs(self, a: int, b: int) -> Tensor:
        """`[.., b - a, b - a]`: from key (column) to query (row), 0 where the key is later."""
        if self.running is None:
            rows = torch.arange(b - a, dtype=self.dtype, device=self.device)
            steps = (rows[:, None] - rows).clamp_min_(0)
            return (self.rate.to(self.dtype) * steps).exp_().tril_()
        sums = self._sums(a, b)
        return (sums - sums.transpose(-1, -2)).clamp_max_(0).to(self.dtype).exp_().tril_()

    def from_start(self, a: int, b: int) -> Tensor:
        """`[.., b - a, 1]`: from the state entering the span to each query."""
        return self._sums(a, b).to(self.dtype).exp_()

    def to_end(self, a: int, b: int) -> Tensor:
        """`[.., b - a, 1]`: from each key to the end of the span."""
        return (self._total(a, b) - self._sums(a, b)).to(self.dtype).exp_()

    def back(self, distance: int) -> Tensor:
        """`[.., T - distance, 1]` or `[.., 1, 1]`: from the token `distance` before to each token that has one."""
        if self.running is None:
            return (self.rate * distance).to(self.dtype).exp_()
        return (self.running[:, :, distance + 1 :] - self.running[:, :, 1:-distance]).to(self.dtype).exp_()

    def each_token(self) -> Tensor:
        """`[T, 1 or B, H, 1, 1]`: the decay of every token by itself, for T products one after another."""
        if self.running is None:
            exact = self.rate.exp().expand(self.tokens, 1, -1, 1, 1)
        else:
            exact = self.running.diff(dim=2).exp().permute(2, 0, 1, 3)[..., None]
        return rounded_in_turns(exact, self.dtype)

    def state_after(self, state: Tensor, a: int, b: int) -> Tensor:
        """`state` `[B, H, K, V]` decayed over the span, by a factor in two parts.

        A factor rounded once errs to the same side at every product; over hundreds of spans fp32 would show it.
        """
        exact = self._total(a, b).exp()
        high = exact.to(self.dtype)
        return torch.addcmul(state * high, state, (exact - high).to(self.dtype))
