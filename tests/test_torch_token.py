"""A step of one token by views made once: the same as the step of several, whatever befalls the state between."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from leet_linear_attention import DecodeState, linear_attention_step, torch_token
from leet_linear_attention.torch_step import step

HEADS, WIDTH, BUFFER = 4, 6, 4


class Pair:
    """A state advanced by `linear_attention_step`, and its twin by the step that makes its views anew."""

    def __init__(self, batch: int = 1, held: int = HEADS, dtype: torch.dtype = torch.float32, keep: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype = (batch, 1, held, WIDTH), dtype
        self.state, self.twin = (
            DecodeState.allocate(batch, HEADS, WIDTH, WIDTH, BUFFER, dtype, key_heads=held, value_heads=held, keep=keep)
            for _ in range(2)
        )

    def advance(self, log_decay: torch.Tensor | None, scale: float = 0.3) -> None:
        # As a projection has them: views of one tensor.
        q, k, v = torch.randn(*self.shape[:3], 3 * WIDTH, generator=self.generator).to(self.dtype).chunk(3, -1)
        state, twin = self.state, self.twin
        got = linear_attention_step(q, k, v, log_decay, state, scale=scale)
        tensors = twin.base, twin.keys, twin.values, twin.log_decays, twin.cursor
        want = step(q, k, v, log_decay, *tensors, scale, BUFFER, twin.keep)
        tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert torch.equal(state.cursor, twin.cursor)
        torch.testing.assert_close(state.base, twin.base, rtol=1e-5, atol=1e-5)

    def change(self, change: Any) -> None:
        for state in (self.state, self.twin):
            change(state)
        self.shape = (self.state.base.shape[0], *self.shape[1:])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step of one token: whether it went by the views, which it does but at the end of the ring."""
    from leet_linear_attention import api

    taken: list[bool] = []

    def counted(*arguments: Any) -> torch.Tensor | None:
        o = torch_token.step_one(*arguments)
        taken.append(o is not None)
        return o

    monkeypatch.setattr(api, "step_one", counted)
    return taken


DECAYS = {
    "none": lambda batch: None,
    "head": lambda batch: -torch.arange(1.0, HEADS + 1) / 9,
    "few": lambda batch: -torch.tensor([0.1, 0.7]),
    "token": lambda batch: -torch.rand(batch, 1, HEADS),
    "forgets": lambda batch: torch.full((HEADS,), -110.0),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("batch", "held", "dtype"), [
    (1, HEADS, torch.float32), (3, HEADS, torch.float32), (1, 2, torch.float32),
    (1, HEADS, torch.bfloat16), (2, 1, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("keep", [0, 3])
def test_the_same_as_several_tokens(
    batch: int, held: int, dtype: torch.dtype, keep: int, decay: str, steps: list[bool]
) -> None:
    pair = Pair(batch, held, dtype, keep)
    for place in range(5 * BUFFER):
        pair.advance(DECAYS[decay](batch))
        if keep and place % 3 == 0:
            back = min(int(pair.state.cursor[1]), place % 4)
            pair.change(lambda state, back=back: state.rewind(back))
    assert steps.count(True) > 2 * BUFFER


@pytest.mark.parametrize("name", ["repeat", "select", "reorder", "reset", "load", "fold", "clone"])
def test_the_state_may_change_between(name: str, steps: list[bool]) -> None:
    changes = {
        "repeat": lambda state: state.repeat(2),
        "select": lambda state: state.select(torch.tensor([1])),
        "reorder": lambda state: state.reorder(torch.tensor([1, 1])),
        "reset": lambda state: state.reset(),
        "load": lambda state: state.load(torch.ones_like(state.base)),
        "fold": lambda state: state.fold(),
        "clone": lambda state: state.clone(),
    }
    pair, decay = Pair(batch=2), -torch.arange(1.0, HEADS + 1) / 9
    for _ in range(3):
        pair.advance(decay)
    pair.change(changes[name])
    for _ in range(2 * BUFFER):
        pair.advance(decay)
    assert all(steps[:4])


def test_copies_do_not_share_views() -> None:
    pair, decay = Pair(), -torch.arange(1.0, HEADS + 1) / 9
    pair.advance(decay)
    state = pair.state
    copies = [state.clone(), pickle.loads(pickle.dumps(state))]
    before = [x.clone() for x in (state.base, state.keys, state.values, state.log_decays, state.cursor)]
    tokens = torch.ones(1, 1, HEADS, WIDTH)
    outputs = [linear_attention_step(tokens, tokens, tokens, decay, copied) for copied in copies]
    assert torch.equal(*outputs)
    now = (state.base, state.keys, state.values, state.log_decays, state.cursor)
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_places_are_bounded() -> None:
    state = DecodeState.allocate(1, HEADS, WIDTH, WIDTH, 64, keep=64)
    tokens = torch.ones(1, 1, HEADS, WIDTH)
    for _ in range(300):
        linear_attention_step(tokens, tokens, tokens, None, state)
    assert len(state.views().places) <= torch_token.MOST_PLACES


def test_in_and_out_of_inference_mode() -> None:
    pair, decay = Pair(), -torch.arange(1.0, HEADS + 1) / 9
    for place in range(4 * BUFFER):
        with torch.inference_mode(place % 3 == 0):
            pair.advance(decay)


def test_a_refused_step_changes_nothing() -> None:
    pair, decay = Pair(), -torch.arange(1.0, HEADS + 1) / 9
    pair.advance(decay)
    before = pair.state.clone()
    tokens = torch.ones(1, 1, HEADS, WIDTH)
    for wrong in (-decay, decay[:3], decay.double()):
        with pytest.raises(ValueError, match="log_decay"):
            linear_attention_step(tokens, tokens, tokens, wrong, pair.state)
    assert torch.equal(before.keys, pair.state.keys) and torch.equal(before.cursor, pair.state.cursor)
