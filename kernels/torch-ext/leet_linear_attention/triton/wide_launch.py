"""Host side of the wide form of a pass: its scores and its launches."""

from __future__ import annotations

from typing import Any

import torch

from . import tuning
from .launcher import Launch, Launcher, aligned_strides, device_index
from .operands import Operands, Segments
from .wide import scores_kernel, wide_kernel

_scores, _wide = Launcher(scores_kernel), Launcher(wide_kernel)


class Wide:
    """Launches of one pass over time, worked out once for operands of the form of ``like``; see ``launch.Sweep``.

    state_strides: of states in memory, along X and along Y.
    """

    def __init__(
        self,
        like: Operands,
        heads: int,
        scale: float,
        reverse: bool,
        state_strides: tuple[int, int],
        config: tuning.SweepConfig,
    ) -> None:
        a, g = like.a, like.log_decay
        self.heads, self.scale, self.reverse, self.config = heads, scale, reverse, config
        self.state_strides, self.decay, self.index = state_strides, 0 if g is None else 1, device_index(a)
        self.batch, self.tokens, _, self.x = a.shape
        self.y = like.c.shape[-1]
        self.chunks = tuning.blocks(self.tokens, config.chunk)
        self.parts = tuning.blocks(self.x, config.block_x)
        self.programs = self.batch * heads * self.parts * tuning.blocks(self.y, config.block_y)
        self.group_g = 1 if g is None else heads // g.shape[-1]
        self._launches: dict[Any, Launch] = {}

    def scores(self, x: Operands) -> torch.Tensor:
        """Those of all chunks: about T * chunk elements a head, for this pass and for the opposite one."""
        chunk = self.config.chunk
        scores = x.a.new_empty((self.parts, self.batch, self.heads, self.chunks, chunk, chunk))
        if scores.numel():
            later, earlier = (x.b, x.a) if self.reverse else (x.a, x.b)
            launch = self._launches.get("scores")
            if launch is None:
                launch = self._launches["scores"] = self._prepared_scores(later, earlier)
            launch(later, earlier, x.log_decay, scores)
        return scores

    def run(
        self,
        x: Operands,
        segments: Segments,
        scores: torch.Tensor | None,
        out: torch.Tensor,
        state_in: torch.Tensor | None,
        state_out: torch.Tensor | None,
    ) -> None:
        """Write ``out`` [B, T, H, Y], or its parts in front of that, and ``state_out``, as ``sweep_kernel`` does."""
        scores = self.scores(x) if scores is None else scores
        form = (segments.number, segments.length, state_in is None, state_out is None)
        launch = self._launches.get(form)
        if launch is None:
            launch = self._launches[form] = self._prepared(x, segments, state_in is not None, state_out is not None)
        launch(x.a, x.b, x.c, x.log_decay, scores, out, state_in, state_out)

    def _prepared_scores(self, later: torch.Tensor, earlier: torch.Tensor) -> Launch:
        align, strides = aligned_strides(later, earlier)
        heads, config = self.heads, self.config
        return Launch(
            _scores, (self.batch * heads * self.chunks, self.parts), self.index,
            (
                self.chunks, self.tokens, heads, heads // later.shape[2], heads // earlier.shape[2], self.group_g,
                self.scale, *strides,
            ),
            (self.x, config.chunk, config.block_x, self.decay, align), 4, 1,
        )  # fmt: skip

    def _prepared(self, x: Operands, segments: Segments, state_in: bool, state_out: bool) -> Launch:
        a, b, c, _, _ = x
        align, strides = aligned_strides(a, b, c)
        heads, config = self.heads, self.config
        return Launch(
            _wide, (self.programs * segments.number,), self.index,
            (
                self.tokens, self.batch * self.tokens, segments.length, segments.number, heads,
                heads // a.shape[2], heads // b.shape[2], heads // c.shape[2], self.group_g, self.scale,
                *strides, *self.state_strides,
            ),
            (
                self.x, self.y, config.chunk, config.block_x, config.block_y, self.decay, self.reverse, align,
                state_in, state_out,
            ),
            config.warps, config.stages,
        )  # fmt: skip
