"""Host side of the sweep: shapes, strides, segments and the launches of one pass over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..shapes import sequence_count
from . import tuning
from .launcher import Launch, Launcher, aligned_strides, can_overlap, device_index
from .operands import ChunkStates, Operands, Segments, Terms
from .sweep import scan_kernel, sweep_kernel
from .wide_launch import Wide

_sweep, _scan = Launcher(sweep_kernel), Launcher(scan_kernel)


class Plans:
    """What was worked out for calls of one form, kept for the next call of that form: it takes longer than a launch."""

    MOST = 1024

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        """The plan of a key, which must hold all that `make` looks at."""
        plan = self._kept.get(key)
        if plan is None:
            if len(self._kept) >= self.MOST:
                self._kept.clear()
            plan = self._kept[key] = make()
        return plan


def form_of(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """All that a plan may depend on of tensors of one device: not their contents, not their addresses."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors])


class Sweep:
    """One pass over time: what its launches need to know, worked out once for operands of one form.

    like: operands of that form; none of them is kept. heads: H. reverse: whether it runs backward in time. transposed:
    states in memory are [Y, X], as when keys and values have exchanged their places. whole: never cut in time. config:
    block shapes of ``sweep_kernel`` other than the table's.

    wide: what launches this pass, unless it has chunk states or terms to give, where it is not ``sweep_kernel``.
    """

    def __init__(
        self,
        like: Operands,
        heads: int,
        *,
        scale: float = 1.0,
        reverse: bool = False,
        transposed: bool = False,
        whole: bool = False,
        config: tuning.SweepConfig | None = None,
    ) -> None:
        a, log_decay = like.a, like.log_decay
        self.heads, self.scale, self.reverse, self.packed = heads, scale, reverse, like.cu_seqlens is not None
        self.batch, self.tokens, _, self.x = a.shape
        self.y = like.c.shape[-1]
        self.index = device_index(a)
        self.decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
        self.config = config or tuning.sweep_config(self.x, self.y, a.dtype, self.decay, self.index)
        self.sequences = sequence_count(a, like.cu_seqlens)
        self.parts = tuning.blocks(self.x, self.config.block_x)
        self.tiles = tuning.blocks(self.y, self.config.block_y) * self.parts  # of the state; each gives its own terms
        self.programs = self.tiles * self.sequences * heads
        self.state_strides = (1, self.x) if transposed else (self.y, 1)
        self.state_shape = (self.y, self.x) if transposed else (self.x, self.y)
        self.cut = Segments(1, max(1, self.tokens))
        if not whole and self.programs:
            cut = Segments(*tuning.segments(self.tokens, self.config, self.programs, self.index))
            self.cut = cut if cut.number > 1 else self.cut
        self._launches: dict[Any, Launch] = {}
        wide = None if config else tuning.wide_config(self.x, a.dtype, self.decay, self.index)
        # packed sequences: see ``wide``; other strides: its loads would be 2 bytes wide
        wide = None if self.packed or aligned_strides(a, like.b, like.c)[0] == 1 else wide
        self.wide = None if wide is None else Wide(like, heads, scale, reverse, self.state_strides, wide)

    def segments(self, x: Operands, state: torch.Tensor | None, final: bool) -> tuple[Segments, torch.Tensor | None]:
        """How to cut this pass, with the states its segments start from, and the last state if there are several.

        state: where the pass starts, [N, H, X, Y] (or transposed) float32 contiguous, or None. final: whether the last
        state is wanted.
        """
        cut = self.cut
        if cut.number == 1:
            return cut, None
        # Every segment's own end state and decay, and a scan over them.
        size = self.x * self.y
        states = x.a.new_empty((self.sequences, self.heads, cut.number, size), dtype=torch.float32)
        g_sum = x.a.new_empty((self.sequences, self.heads, cut.number), dtype=torch.float64)
        self._launch(x, cut, state_out=states, g_sum=g_sum, skip=0 if final else 1)
        last = self._state(x) if final else None
        block = 1024
        _scan(
            (self.sequences * self.heads, tuning.blocks(size, block)), self.index,
            (states, g_sum, state, last), (cut.number, size), (self.reverse, state is not None, final, block), 4, 1,
        )  # fmt: skip
        return cut._replace(starts=states), last

    def scores(self, x: Operands) -> torch.Tensor | None:
        """The scores that a wide pass reads, for its ``run``; None of any other pass."""
        return None if self.wide is None else self.wide.scores(x)

    def chunk_states(self, like: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> ChunkStates:
        """Places for the state that meets each chunk of this pass, or of the opposite one with the same chunks.

        near, far: contiguous memory of as many entries as [B, T, H, Y] and [B, T, H, X] in ``like``'s dtype that nobody
        reads or writes in these passes, or that is this pass's own outputs; it serves where a state fits.
        """
        chunk = self.config.chunk
        # States outgrow float16's range.
        dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
        lent = dtype == like.dtype and (self.x <= chunk or (self.x <= 2 * chunk and self.y <= self.x))
        ragged = self.sequences if self.packed or self.tokens % chunk else 0
        # packed sequences need at most one more each
        slots = ragged + (0 if lent else self.batch * (self.tokens // chunk))
        states = like.new_empty((slots, self.heads, self.x, self.y), dtype=dtype)
        return ChunkStates(states, near, far) if lent else ChunkStates(states)

    def summed(self, heads: int) -> int:
        """Entries of what is summed to outputs of ``heads`` heads; 0 where the launch writes the outputs themselves."""
        if self.parts == 1 and heads == self.heads:
            return 0
        return self.parts * self.batch * self.tokens * self.heads * self.y

    def written(self, out: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """What a launch writes for outputs ``out`` [B, T, heads, Y]: these, or what is summed, [parts, B, T, H, Y].

        spare: contiguous memory of out's dtype that nobody reads or writes until the sum is made; it serves if large
        enough.
        """
        entries = self.summed(out.shape[2])
        if entries == 0:
            return out
        shape = (self.parts, self.batch, self.tokens, self.heads, self.y)
        # Two roundings for one, and half the memory; but parts in float16 could overflow where their sum does not.
        dtype = torch.float32 if self.parts > 1 and out.dtype == torch.float16 else out.dtype
        if spare is not None and spare.dtype == dtype and spare.numel() >= entries:
            return spare.view(-1)[:entries].view(shape)
        return out.new_empty(shape, dtype=dtype)

    def run(
        self,
        x: Operands,
        state: torch.Tensor | None,
        *,
        out: torch.Tensor | None = None,
        written: torch.Tensor | None = None,
        final: bool = False,
        segments: Segments | None = None,
        scores: torch.Tensor | None = None,
        chunk_states: ChunkStates | None = None,
        terms: Terms | None = None,
        beside: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs [B, T, H, Y] in a's dtype, and the last state if wanted (None where ``segments`` were given).

        out: where they go, contiguous; of fewer heads than H, each takes the sum of the state heads that share it.
        written: what `written` gave for ``out``. segments: what `segments` gave for this pass, or for one with the same
        states in the other order of X and Y. scores: what `scores` gave for this pass, or for one with a and b, and the
        directions of time, exchanged. chunk_states: receives the state that meets each chunk; with ``terms`` holds
        those of the opposite pass. beside: whether it may run while the launch in front of it does: it reads nothing of
        that one's, and no memory that one uses was given back since. Only passes backward in time do.
        """
        last = None
        if segments is None:
            segments, last = self.segments(x, state, final)
        one = segments.number == 1
        if final and one:
            last = self._state(x)
        if out is None:
            out = x.a.new_empty((self.batch, self.tokens, self.heads, self.y))
        if written is None:
            written = self.written(out)
        if self.programs:
            state_in, state_out = (state, last) if one else (segments.starts, None)
            if self.wide is not None and chunk_states is None and terms is None:
                self.wide.run(x, segments, scores, written, state_in, state_out)
            else:
                self._launch(
                    x, segments, out=written, state_in=state_in, state_out=state_out, chunk_states=chunk_states,
                    terms=terms, beside=beside,
                )  # fmt: skip
        if written is not out:
            self._sum(written, out)
        return out, last

    def _sum(self, written: torch.Tensor, out: torch.Tensor) -> None:
        """The sum of all parts, and of the state heads that share one of ``out``'s."""
        total = written[0]
        heads = out.shape[2]
        if self.parts > 1:  # the widest rows take two programs
            total = torch.add(*written, out=out if heads == self.heads else total)
        if heads != self.heads:
            total = total.unflatten(2, (heads, -1))
            if total.dtype == out.dtype:
                torch.sum(total, 3, out=out)
            else:
                out.copy_(total.sum(3))

    def _state(self, x: Operands) -> torch.Tensor:
        return x.a.new_empty((self.sequences, self.heads, *self.state_shape), dtype=torch.float32)

    def _launch(
        self,
        x: Operands,
        segments: Segments,
        *,
        out: torch.Tensor | None = None,
        state_in: torch.Tensor | None = None,
        state_out: torch.Tensor | None = None,
        g_sum: torch.Tensor | None = None,
        chunk_states: ChunkStates | None = None,
        terms: Terms | None = None,
        skip: int = 0,
        beside: bool = False,
    ) -> None:
        keys, into = (None, None) if terms is None else terms
        states, near, far = (None, None, None) if chunk_states is None else chunk_states
        tensors = (
            x.a, x.b, x.c, keys, x.log_decay, out, state_in, state_out, g_sum, states, near, far, into, x.cu_seqlens,
        )  # fmt: skip
        form = (segments.number, segments.length, skip, beside, *[t is None for t in tensors[5:13]])
        launch = self._launches.get(form)
        if launch is None:
            launch = self._launches[form] = self._prepared(
                x, segments, keys, skip, beside, *[t is not None for t in tensors[5:13]]
            )
        launch(*tensors)

    def _prepared(
        self, x: Operands, segments: Segments, keys: torch.Tensor | None, skip: int, beside: bool,
        out: bool, state_in: bool, state_out: bool, g_sum: bool, states: bool, near: bool, far: bool, terms: bool,
    ) -> Launch:  # fmt: skip
        """The launch of operands of this form with these tensors: see `sweep_kernel`."""
        a, b, c, g, config = x.a, x.b, x.c, x.log_decay, self.config
        if not out:
            config = tuning.without_outputs(config, a.element_size(), self.index)
        d = c if keys is None else keys
        align, strides = aligned_strides(a, b, c, d)
        heads, overlap = self.heads, can_overlap(self.index)
        return Launch(
            _sweep, (self.programs * (segments.number - skip),), self.index,
            (
                self.tokens, self.batch * self.tokens, segments.length, segments.number, skip, heads,
                heads // a.shape[2], heads // b.shape[2], heads // c.shape[2], heads // d.shape[2],
                1 if g is None else heads // g.shape[-1], self.scale, *strides,
                *(g.stride() if g is not None and self.decay == 2 else (0, 0, 0)), *self.state_strides, int(beside),
            ),
            (
                self.x, self.y, config.chunk, config.block_x, config.block_y, self.decay, self.reverse, self.packed,
                align, config.warps > 4, out, state_in, state_out, states and not terms, near, terms,
                g_sum, a.dtype == torch.float32, a.dtype == torch.float16, overlap,
            ),
            config.warps, config.stages, overlap and self.reverse,
        )  # fmt: skip
