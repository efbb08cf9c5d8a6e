"""A decode state and, beside it, every token it should hold: what tests of any history compare."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from leet_linear_attention import DecodeState, linear_attention_step, reference
from operator_cases import TOLERANCE, error, wide

B, K, V, N = 2, 24, 16, 8


class History:
    """Drives a decode state and remembers, per row, every token it should hold."""

    def __init__(self, target: tuple[str, str], dtype: torch.dtype, heads=(4, 2, 1, 4), keep: int = 0, seed: int = 0):
        self.device, self.method = target
        self.dtype, self.heads = dtype, heads
        self.random, self.numbers = random.Random(seed), torch.Generator().manual_seed(seed)
        _, hk, hv, hg = heads
        self.state_heads = max(heads)
        self.state = DecodeState.allocate(
            B, self.state_heads, K, V, N, dtype, self.device, key_heads=hk, value_heads=hv, keep=keep
        )
        self.k, self.v, self.g = (self.state.base.new_zeros(B, 0, h, d) for h, d in ((hk, K), (hv, V), (hg, 1)))
        self.start = torch.zeros_like(self.state.base, dtype=torch.float64)

    def new(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hq, hk, hv, hg = self.heads
        rows = self.state.base.shape[0]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=self.numbers).to(self.device, self.dtype)

        uniform = torch.rand(rows, tokens, hg, generator=self.numbers, dtype=torch.float64)
        log_decay = -(10 ** (5.4771 * uniform - 4))
        log_decay = torch.where(uniform < 0.1, 0.0, log_decay).to(self.device, wide(self.dtype))
        q, k, v = normal(rows, tokens, hq, K), normal(rows, tokens, hk, K), normal(rows, tokens, hv, V)
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.g = torch.cat([self.g, log_decay.unsqueeze(-1)], 1)
        return q, k, v, log_decay

    def oracle(self, q: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([q.new_zeros(q.shape[0], self.k.shape[1] - q.shape[1], *q.shape[2:]), q], 1)
        o, final = reference.recurrent(
            padded,
            self.k,
            self.v,
            self.g.squeeze(-1),
            scale=0.3,
            initial_state=self.start,
            output_final_state=True,
        )
        assert final is not None
        return o[:, o.shape[1] - q.shape[1] :], final

    def step(self, tokens: int) -> None:
        q, k, v, log_decay = self.new(tokens)
        o = linear_attention_step(q, k, v, log_decay, self.state, scale=0.3, method=self.method)
        expected, final = self.oracle(q)
        assert o.shape == expected.shape and o.dtype == self.dtype
        assert error(o, expected) <= TOLERANCE[self.dtype]
        self.check(final)

    def append(self, tokens: int) -> None:
        q, k, v, log_decay = self.new(tokens)
        self.state.append(k, v, log_decay)
        self.check(self.oracle(q)[1])

    def check(self, final: Tensor) -> None:
        assert error(self.state.clone().fold(), final) <= 1e-5
        start, count, ticket = self.state.cursor.tolist()
        assert 0 <= start < 2 * N and 0 <= count <= N and ticket == 0

    def rewind(self, tokens: int) -> None:
        self.state.rewind(tokens)
        left = self.k.shape[1] - tokens
        self.k, self.v, self.g = self.k[:, :left], self.v[:, :left], self.g[:, :left]

    def rows(self, change) -> None:
        self.k, self.v, self.g, self.start = (change(x) for x in (self.k, self.v, self.g, self.start))

    def forget(self, start: Tensor) -> None:
        self.k, self.v, self.g = self.k[:, :0], self.v[:, :0], self.g[:, :0]
        self.start = start

    @property
    def count(self) -> int:
        return int(self.state.cursor[1])
