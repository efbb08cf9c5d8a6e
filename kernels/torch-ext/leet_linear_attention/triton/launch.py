"""Host side of the sweep: shapes, strides, segments and the launches of one pass over time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..shapes import sequence_count
from . import tuning
from .launcher import Launcher, aligned_strides, device_index
from .sweep import scan_kernel, sweep_kernel

_sweep, _scan = Launcher(sweep_kernel), Launcher(scan_kernel)


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


def chunk_slots(tokens: int, sequences: int, batch: int, chunk: int, packed: bool) -> int:
    """Places for one state per chunk: packed sequences need at most one extra each."""
    return tokens // chunk + sequences if packed else batch * tuning.blocks(tokens, chunk)


class Sweep:
    """One pass over time: its arguments, and the launches that need them.

    a, b: [B, T, Ha, X] and [B, T, Hb, X], rows and keys (unit last stride); c: [B, T, Hc, Y], values. log_decay: None,
    [H] or [B, T, H] float32. heads: H. reverse: whether it runs backward in time. transposed: states in memory are
    [Y, X], as when keys and values have exchanged their places. whole: never cut in time. config: block shapes other
    than the table's.
    """

    def __init__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        log_decay: torch.Tensor | None,
        heads: int,
        cu_seqlens: torch.Tensor | None,
        *,
        scale: float = 1.0,
        reverse: bool = False,
        transposed: bool = False,
        whole: bool = False,
        config: tuning.SweepConfig | None = None,
    ) -> None:
        self.a, self.b, self.c, self.log_decay, self.cu_seqlens = a, b, c, log_decay, cu_seqlens
        self.heads, self.scale, self.reverse, self.whole = heads, scale, reverse, whole
        self.batch, self.tokens, _, self.x = a.shape
        self.y = c.shape[-1]
        self.index = device_index(a)
        self.decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
        self.config = config or tuning.sweep_config(self.x, self.y, a.element_size(), self.decay, self.index)
        self.sequences = sequence_count(a, cu_seqlens)
        self.parts = tuning.blocks(self.x, self.config.block_x)
        self.tiles = tuning.blocks(self.y, self.config.block_y) * self.parts  # of the state; each gives its own terms
        self.programs = self.tiles * self.sequences * heads
        self.state_strides = (1, self.x) if transposed else (self.y, 1)
        self.state_shape = (self.y, self.x) if transposed else (self.x, self.y)

    def segments(self, state: torch.Tensor | None, final: bool) -> tuple[Segments, torch.Tensor | None]:
        """How to cut this pass, with the states its segments start from, and the last state if there are several.

        state: where the pass starts, [N, H, X, Y] (or transposed) float32 contiguous, or None. final: whether the last
        state is wanted.
        """
        one = Segments(1, max(1, self.tokens))
        if self.whole or self.programs == 0:
            return one, None
        cut = Segments(*tuning.segments(self.tokens, self.config.chunk, self.programs, self.index))
        if cut.number == 1:
            return one, None
        # Every segment's own end state and decay, and a scan over them.
        size = self.x * self.y
        states = self.a.new_empty((self.sequences, self.heads, cut.number, size), dtype=torch.float32)
        g_sum = self.a.new_empty((self.sequences, self.heads, cut.number), dtype=torch.float64)
        self._launch(cut, state_out=states, g_sum=g_sum, skip=0 if final else 1)
        last = self._state() if final else None
        block = 1024
        _scan(
            (self.sequences * self.heads, tuning.blocks(size, block)), self.index,
            (states, g_sum, state, last), (cut.number, size), (self.reverse, state is not None, final, block), 4, 1,
        )  # fmt: skip
        return cut._replace(starts=states), last

    def run(
        self,
        state: torch.Tensor | None,
        *,
        final: bool = False,
        segments: Segments | None = None,
        chunk_states: torch.Tensor | None = None,
        terms: Terms | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs [B, T, H, Y] in a's dtype, and the last state if wanted (None where ``segments`` were given).

        segments: what `segments` gave for this pass, or for one with the same states in the other order of X and Y.
        chunk_states: [slots, H, X, Y], receives the state that meets each chunk; with ``terms`` holds those of the
        opposite pass.
        """
        last = None
        if segments is None:
            segments, last = self.segments(state, final)
        one = segments.number == 1
        if final and one:
            last = self._state()
        shape = (self.batch, self.tokens, self.heads, self.y)
        split = self.parts > 1
        out = self.a.new_empty((self.parts, *shape) if split else shape, dtype=torch.float32 if split else None)
        if self.programs:
            self._launch(
                segments, out=out, state_in=state if one else segments.starts, state_out=last if one else None,
                chunk_states=chunk_states, terms=terms,
            )  # fmt: skip
        return self._added(out) if split else out, last

    def _added(self, parts: torch.Tensor) -> torch.Tensor:
        """The sum of the parts [parts, ...] float32, rounded once to a's dtype."""
        total = parts.new_empty(parts.shape[1:], dtype=self.a.dtype)
        return torch.add(parts[0], parts[1], out=total) if len(parts) == 2 else total.copy_(parts.sum(0))

    def _state(self) -> torch.Tensor:
        return self.a.new_empty((self.sequences, self.heads, *self.state_shape), dtype=torch.float32)

    def _launch(
        self,
        segments: Segments,
        *,
        out: torch.Tensor | None = None,
        state_in: torch.Tensor | None = None,
        state_out: torch.Tensor | None = None,
        g_sum: torch.Tensor | None = None,
        chunk_states: torch.Tensor | None = None,
        terms: Terms | None = None,
        skip: int = 0,
    ) -> None:
        a, b, c, g, config = self.a, self.b, self.c, self.log_decay, self.config
        d = c if terms is None else terms.keys
        align, strides = aligned_strides(a, b, c, d)
        heads = self.heads
        _sweep(
            (self.programs * (segments.number - skip),), self.index,
            (
                a, b, c, None if terms is None else d, g, out, state_in, state_out, g_sum, chunk_states,
                None if terms is None else terms.out, self.cu_seqlens,
            ),
            (
                self.tokens, self.batch * self.tokens, segments.length, segments.number, skip, heads,
                heads // a.shape[2], heads // b.shape[2], heads // c.shape[2], heads // d.shape[2],
                1 if g is None else heads // g.shape[-1], self.scale, *strides,
                *(g.stride() if g is not None and self.decay == 2 else (0, 0, 0)), *self.state_strides,
            ),
            (
                self.x, self.y, config.chunk, config.block_x, config.block_y, self.decay, self.reverse,
                self.cu_seqlens is not None, align, config.warps > 4, out is not None,
                state_in is not None,
                state_out is not None, chunk_states is not None and terms is None, terms is not None,
                g_sum is not None, a.dtype == torch.float32, a.dtype == torch.float16,
            ),
            config.warps, config.stages,
        )  # fmt: skip
