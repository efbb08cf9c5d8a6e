"""What the tests of the cache layer share: random tokens, and a layer beside all it should remember."""

from __future__ import annotations

from typing import Any

import torch

from leet_hf.attend import attend
from leet_hf.cache import RecurrentLayer
from leet_hf.shapes import RecurrentShape, SoftmaxShape
from leet_linear_attention import linear_attention

HEADS, KEY, VALUE = 4, 8, 6
SPEC = (RecurrentShape(HEADS, 2, HEADS, KEY, VALUE), SoftmaxShape(2, 16))
LOG_DECAY = torch.tensor([-0.01, -0.1, -0.5, -2.0])


class Tokens:
    """Random q, k, v [B, T, h, D] that go on from a seed."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
        shapes = ((HEADS, KEY), (2, KEY), (HEADS, VALUE))
        return tuple(torch.randn(batch, tokens, *shape, generator=self.generator) for shape in shapes)


class History:
    """A layer beside all the tokens it should remember, from which its outputs and state are computed anew."""

    def __init__(self, layer: RecurrentLayer, batch: int = 2) -> None:
        self.layer, self.draw = layer, Tokens()
        self.past = self.draw(batch, 0)

    def forward(self, tokens: int) -> None:
        new = self.draw(len(self.past[0]), tokens)
        self.past = tuple(torch.cat([old, x], 1) for old, x in zip(self.past, new, strict=True))
        o, state = attend(*new, LOG_DECAY, scale=0.5, layer=self.layer, return_state=True)
        want, want_state = linear_attention(*self.past, LOG_DECAY, scale=0.5, output_final_state=True)
        torch.testing.assert_close(o, want[:, want.shape[1] - tokens :], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state, want_state, rtol=1e-4, atol=1e-4)
        self.check()

    def change(self, change: Any) -> None:
        self.past = tuple(change(x) for x in self.past)

    def check(self) -> None:
        layer, length = self.layer, self.past[0].shape[1]
        assert int(layer.get_seq_length()) == length
        if layer.state is None:
            assert length == 0
            return
        _, want = linear_attention(*self.past, LOG_DECAY, output_final_state=True)
        torch.testing.assert_close(layer.current_state(), want, rtol=1e-4, atol=1e-4)
        if type(layer) is RecurrentLayer:
            assert int(layer.state.cursor[1]) == layer._held, "the host's counter is the device's"
            assert layer.batch_size == len(self.past[0])
