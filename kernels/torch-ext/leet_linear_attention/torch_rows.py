"""The forward of the chunkwise torch form on a CPU: chunk after chunk, each a handful of products over heads.

The formulas of `torch_chunked`. Where calls cost little and memory is slow, nothing is gathered from several chunks:
a chunk of one row is a view, products read it where it is, and states stay in a core's cache from chunk to chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunking import Chunking
from .decay_factors import ChunkDecay, DecayFactors

CHUNK = 32
# Heads of a row are taken together while their states have at most this many numbers.
STATE_NUMBERS = 1 << 16
# Fewer numbers of k and v per token would leave a chunk's products smaller than the calls that start them.
LEAST_NUMBERS_PER_TOKEN = 512


def serves(q: Tensor, v: Tensor, heads: int, cu_seqlens: Tensor | None) -> bool:
    """Whether this form is the better one for q `[B, T, Hq, K]`, v `[B, T, Hv, V]` and `heads` state heads."""
    wide = heads * (q.shape[-1] + v.shape[-1]) >= LEAST_NUMBERS_PER_TOKEN
    return q.device.type == "cpu" and cu_seqlens is None and wide


def forward_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    fresh: bool,
    decay: DecayFactors,
    cut: Chunking,
    scale: float,
    out: Tensor,
) -> None:
    """Fill out `[B, T, H, V]` and advance state `[B, H, K, V]` in place; fresh says that state is zero.

    q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]` in any dtype; state, decay and sums are in state's.
    """
    batch, heads, key_dim, value_dim = state.shape
    together = min(heads, max(1, STATE_NUMBERS // (key_dim * value_dim)))
    parts = [slice(h, min(h + together, heads)) for h in range(0, heads, together)]
    lanes = [_Lane(q, k, v, state, out, cut.chunk, b, part) for b in range(batch) for part in parts]
    constant = decay.per_token is None
    if constant:
        for lane in lanes:
            lane.use(decay.of(0, 1))
    for i in range(cut.count):
        tokens = min(cut.chunk, cut.tokens - i * cut.chunk)
        factors = None if constant and tokens == cut.chunk else decay.of(i, i + 1)
        for lane in lanes:
            if tokens != cut.chunk:
                lane.make_room(tokens)
            if factors is not None:
                lane.use(factors, tokens)
            whole = lane.of_lane(decay.whole[i : i + 1]) if constant else lane.whole
            lane.advance(i, whole, scale, reads_state=i > 0 or not fresh)


class _Lane:
    """Some heads of one row: their chunks, state, factors and room for what a chunk's products give."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, out: Tensor, chunk: int, b: int, part: slice
    ) -> None:
        self.b, self.part, self.dtype = b, part, state.dtype
        self.q, self.k, self.v, self.out = (_chunks(x, b, state.shape[1], part, chunk) for x in (q, k, v, out))
        self.state = state[b, part]
        self.make_room(chunk)

    def make_room(self, tokens: int) -> None:
        heads, key_dim, value_dim = self.state.shape
        self.weights = self.state.new_empty(heads, tokens, tokens)
        self.o = self.state.new_empty(heads, tokens, value_dim)
        self.queries, self.keys = self.state.new_empty(2, heads, tokens, key_dim).unbind(0)
        self.keys_transposed = self.keys.mT

    def use(self, factors: ChunkDecay, tokens: int | None = None) -> None:
        """Decay by these factors of one chunk, of which `tokens` tokens are there."""
        c = slice(tokens)
        self.pair = self.of_lane(factors.pair)[:, c, c]
        self.query, self.key = (self.of_lane(x)[:, c] for x in (factors.query, factors.key))
        self.whole = self.of_lane(factors.whole)

    def of_lane(self, factor: Tensor) -> Tensor:
        """`[H or 1, c, 1 or c]` or `[1, B or 1, H or 1, c, 1 or c]` without other rows and heads."""
        if factor.dim() == 5:
            factor = factor[0, self.b if factor.shape[1] > 1 else 0]
        return factor if factor.shape[0] == 1 else factor[self.part]

    def advance(self, i: int, whole: Tensor, scale: float, reads_state: bool) -> None:
        """Outputs of chunk i, and the state after it."""
        q, k, v = self.q[i], self.k[i], self.v[i]
        if q.dtype != self.dtype:
            q, k, v = q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)
        torch.bmm(q, k.mT, out=self.weights)
        o = torch.bmm(self.weights.mul_(self.pair), v, out=self.o)
        if reads_state:
            o.baddbmm_(torch.mul(q, self.query, out=self.queries), self.state)
            self.state.mul_(whole)
        torch.mul(k, self.key, out=self.keys)
        self.state.baddbmm_(self.keys_transposed, v)
        self.out[i].copy_(o if scale == 1.0 else o.mul_(scale))


def _chunks(x: Tensor, b: int, heads: int, part: slice, chunk: int) -> tuple[Tensor, ...]:
    """Chunks `[heads, chunk, D]` of row b of `x` `[B, T, h, D]` for some state heads: views where each has its own."""
    row = x[b].transpose(0, 1)
    if x.shape[2] == heads:
        return row[part].split(chunk, 1)
    owner = torch.arange(part.start, part.stop, device=x.device) // (heads // x.shape[2])
    return row.index_select(0, owner).split(chunk, 1)
