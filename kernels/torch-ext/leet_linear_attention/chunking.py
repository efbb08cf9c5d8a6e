"""How the chunkwise torch form cuts tokens into chunks, each of one sequence, front-aligned and padded with zeros."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = {"cpu": 32}
CHUNK_ON_DEVICE = 64
# Scores (chunk x chunk), states and tokens of one segment stay below this many numbers each: few enough for a CPU's
# cache and to bound the memory of a long sequence, enough that the Python loop over segments costs little.
SEGMENT_NUMBERS = {"cpu": 1 << 19}
SEGMENT_NUMBERS_ON_DEVICE = 1 << 24


class Scratch:
    """Buffers that each segment finds where the one before left them, warm in a CPU's cache."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """The buffer `name`, with whatever it holds."""
        size = math.prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return buffer[:size].view(shape)


class Chunking:
    """Cuts `[B, T, h, D]` tensors into `[n, B, h, chunk, D]` runs of chunks and puts results back.

    With `cu_seqlens` (B = 1) the number of chunks is the upper bound `T // chunk + N`, known without reading the
    device; unused chunks at the end hold no token and belong to no sequence.
    """

    def __init__(
        self, tokens: int, cu_seqlens: Tensor | None, device: torch.device, longest: int | None = None
    ) -> None:
        self.tokens = tokens
        self.packed = cu_seqlens is not None
        self.device = device
        if longest is None:
            longest = CHUNK.get(device.type, CHUNK_ON_DEVICE)
        if cu_seqlens is None:
            self.chunk = max(1, min(longest, tokens))
            self.count = -(-tokens // self.chunk)
            starts = torch.arange(self.count, device=device) * self.chunk
            self.lengths = (tokens - starts).clamp_(max=self.chunk)
        else:
            self._pack(tokens, cu_seqlens, device, longest)
        self.rows = torch.arange(self.chunk, device=device)
        self.steps = (self.rows[:, None] - self.rows).clamp_min_(0)  # tokens from column to row

    def _pack(self, tokens: int, cu_seqlens: Tensor, device: torch.device, longest: int) -> None:
        sequences = cu_seqlens.numel() - 1
        mean = -(-tokens // max(1, sequences))
        # Chunks near the mean length bound the padding: about three cells per token however short the sequences are.
        self.chunk = max(1, min(longest, 1 << (mean - 1).bit_length() if mean else 1))
        self.count = tokens // self.chunk + min(sequences, tokens)
        bounds = cu_seqlens.to(torch.int64)
        chunks_before = torch.zeros_like(bounds)
        chunks_before[1:] = (bounds.diff() + self.chunk - 1).div_(self.chunk, rounding_mode="floor").cumsum_(0)
        number = torch.arange(self.count, device=device)
        owner = torch.searchsorted(chunks_before[1:].contiguous(), number, right=True)
        used = owner < sequences
        owner = owner.clamp_(max=max(0, sequences - 1))
        starts = bounds[owner] + (number - chunks_before[owner]) * self.chunk
        self.lengths = torch.where(used, (bounds[owner + 1] - starts).clamp_(max=self.chunk), 0)
        cell = torch.arange(self.chunk, device=device)
        self.padding = cell >= self.lengths[:, None]
        # Padding cells point at one row past the end, which results have and drop.
        self.index = (starts[:, None] + cell).masked_fill_(self.padding, tokens)
        self.owner = owner
        self.first = used & (number == chunks_before[owner])
        self.last = used & (number == chunks_before[owner + 1] - 1)
        self.sequences = sequences

    def segments(self, numbers_per_chunk: int) -> list[tuple[int, int]]:
        """Runs `[lo, hi)` of chunks that are worked on at once."""
        limit = SEGMENT_NUMBERS.get(self.device.type, SEGMENT_NUMBERS_ON_DEVICE)
        size = max(1, limit // max(1, numbers_per_chunk))
        return [(lo, min(lo + size, self.count)) for lo in range(0, self.count, size)]

    def without_padding(self, lo: int, hi: int) -> bool:
        """Whether chunks lo to hi are known, without reading the device, to be full."""
        return not self.packed and hi * self.chunk <= self.tokens

    def remaining(self, lo: int, hi: int) -> Tensor:
        """Tokens after each one in its chunk, `[n, c]`."""
        return (self.lengths[lo:hi, None] - 1 - self.rows).clamp_min_(0)

    def take(self, x: Tensor, lo: int, hi: int, out: Tensor) -> Tensor:
        """Chunks lo to hi of `x` `[B, T, h, D]`, copied to `out` `[n, B, h, chunk, D]`, 0 where padded."""
        n, c = hi - lo, self.chunk
        heads, width = x.shape[2:]
        if self.packed:
            padding = self.padding[lo:hi]
            rows = x[0].index_select(0, self.index[lo:hi].clamp(max=self.tokens - 1).flatten())
            cells = rows.view(n, c, heads, width).masked_fill(padding[:, :, None, None], 0)
            return out.copy_(cells.transpose(1, 2).unsqueeze(1))
        x = x[:, lo * c : hi * c]
        whole, rest = divmod(x.shape[1], c)
        out[:whole].copy_(x[:, : whole * c].unflatten(1, (whole, c)).permute(1, 0, 3, 2, 4))
        if rest:
            out[whole, :, :, :rest].copy_(x[:, whole * c :].transpose(1, 2))
            out[whole, :, :, rest:].zero_()
        return out

    def empty(self, batch: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """Room for a result: `put` fills it, `trim` gives the `[B, T, h, D]` part."""
        return torch.empty((batch, self.tokens + self.packed, heads, width), dtype=dtype, device=self.device)

    def put(self, out: Tensor, chunks: Tensor, lo: int, hi: int) -> None:
        """Write chunks lo to hi, `[n, B, H, chunk, D]`, into `out`, summing groups of heads where `out` has fewer."""
        c = self.chunk
        if chunks.shape[2] != out.shape[2]:
            chunks = chunks.unflatten(2, (out.shape[2], -1)).sum(3)
        if self.packed:
            rows = chunks.squeeze(1).transpose(1, 2).reshape(-1, *out.shape[2:])
            out[0].index_copy_(0, self.index[lo:hi].flatten(), rows.to(out.dtype))
            return
        out = out[:, lo * c : hi * c]
        whole, rest = divmod(out.shape[1], c)
        out[:, : whole * c].unflatten(1, (whole, c)).copy_(chunks[:whole].permute(1, 0, 3, 2, 4))
        if rest:
            out[:, whole * c :].copy_(chunks[whole, :, :, :rest].transpose(1, 2))

    def trim(self, out: Tensor) -> Tensor:
        """A result without the spare row."""
        return out[0, : self.tokens].unsqueeze(0) if self.packed else out

    def scan(
        self, chunks: Tensor, decay: Tensor, given: Tensor | None, lo: int, hi: int, reverse: bool = False
    ) -> Tensor:
        """Run `x <- decay * x + update` over chunks lo to hi and return the x each chunk was given.

        chunks `[n + 1, B, H, K, V]`: the updates, with the x carried in from outside in the slot before them (after
        them if `reverse`); overwritten with the x after each chunk. decay broadcasts to `[n, B, H, 1, 1]`. given: with
        packing, the x `[N, H, K, V]` with which every sequence begins (None is zero).
        """
        n = hi - lo
        slots = chunks.unbind(0)
        decays = decay.expand(n, *chunks.shape[1:3], 1, 1).unbind(0)
        steps = [(c + 1, c, c) if reverse else (c, c + 1, c) for c in range(n)]
        if reverse:
            steps.reverse()
        before = chunks[1:] if reverse else chunks[:-1]
        if not self.packed:
            for source, target, c in steps:
                slots[target].addcmul_(slots[source], decays[c])
            return before
        begins = (self.last if reverse else self.first)[lo:hi, None, None, None, None]
        # where, not a product with 0: what is not a number in one sequence stays there.
        begin = torch.zeros_like(before) if given is None else given[self.owner[lo:hi], None]
        for source, target, c in steps:
            slots[target].addcmul_(torch.where(begins[c], begin[c], slots[source]), decays[c])
        return torch.where(begins, begin, before)

    def ends(self, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for one state per sequence, `[N + 1, H, K, V]`, holding what it was given, as an empty sequence does."""
        out = torch.zeros((self.sequences + 1, *shape), dtype=dtype, device=self.device)
        if given is not None:
            out[:-1].copy_(given)
        return out

    def put_ends(self, out: Tensor, after: Tensor, lo: int, hi: int, reverse: bool = False) -> None:
        """Write the x after chunks that end a sequence (begin one if `reverse`) into `out`, others in its spare row."""
        ends = (self.first if reverse else self.last)[lo:hi]
        out.index_copy_(0, torch.where(ends, self.owner[lo:hi], self.sequences), after.squeeze(1))
