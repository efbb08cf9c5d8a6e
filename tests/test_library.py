"""The torch.library operators: schema, fakes, autograd registration and tracing."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from leet_linear_attention import DecodeState, available_methods, linear_attention, linear_attention_step

OPERATORS = torch.ops.leet_linear_attention


def arguments(tokens: int, decay: str, grad: bool = True) -> list[torch.Tensor | None]:
    q, k = torch.randn(2, tokens, 2, 16), torch.randn(2, tokens, 1, 16)
    v = torch.randn(2, tokens, 4, 24)
    log_decay = {"none": None, "head": -torch.rand(4), "token": -torch.rand(2, tokens, 4)}[decay]
    state = torch.randn(2, 4, 16, 24)
    return [x.requires_grad_(grad) if x is not None else None for x in (q, k, v, log_decay, state)]


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("with_state", [False, True])
def test_opcheck_forward(decay: str, with_state: bool) -> None:
    q, k, v, g, state = arguments(20, decay)
    opcheck(
        OPERATORS.forward.default, (q, k, v, g, state if with_state else None, None, 0.5, with_state, False, "torch")
    )


def test_opcheck_forward_packed() -> None:
    q, k, v, g, _ = (x[:1].detach().requires_grad_() for x in arguments(20, "token"))
    bounds = torch.tensor([0, 0, 7, 20], dtype=torch.int32)
    opcheck(OPERATORS.forward.default, (q, k, v, g, None, bounds, 1.0, True, False, "torch"))


@pytest.mark.parametrize("tokens", [1, 5])
def test_opcheck_step(tokens: int) -> None:
    q, k, v, g, _ = arguments(tokens, "token", grad=False)
    state = DecodeState.allocate(2, 4, 16, 24, buffer=8, key_heads=1)
    opcheck(
        OPERATORS.step.default,
        (q, k, v, g, state.base, state.keys, state.values, state.log_decays, state.cursor, 1.0, 8, 2, "torch"),
    )


def test_one_graph_for_all_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens in (33, 64, 100):
        q, k, v, g, state = arguments(tokens, "token")
        o, final = compiled(q, k, v, g, initial_state=state, output_final_state=True)
        wanted, wanted_final = linear_attention(q, k, v, g, initial_state=state, output_final_state=True)
        torch.testing.assert_close(o, wanted)
        inputs = [q, k, v, g, state]
        got = torch.autograd.grad(o.square().sum() + final.sum(), inputs)
        expected = torch.autograd.grad(wanted.square().sum() + wanted_final.sum(), inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_step_mutates_the_state() -> None:
    torch._dynamo.reset()
    state = DecodeState.allocate(2, 4, 16, 24, buffer=4, key_heads=1)
    twin = DecodeState.allocate(2, 4, 16, 24, buffer=4, key_heads=1)
    compiled = torch.compile(
        lambda q, k, v, g: linear_attention_step(q, k, v, g, state), fullgraph=True, backend="aot_eager"
    )
    torch._dynamo.utils.counters.clear()
    for _ in range(9):
        q, k, v, g, _ = arguments(1, "token", grad=False)
        torch.testing.assert_close(compiled(q, k, v, g), linear_attention_step(q, k, v, g, twin))
    torch.testing.assert_close(state.fold(), twin.fold())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_refusals_are_readable() -> None:
    q, k, v, _, _ = arguments(3, "none", grad=False)
    with pytest.raises(ValueError, match="method was 'fast', must be 'auto' or one of"):
        linear_attention(q, k, v, method="fast")
    with pytest.raises(ValueError, match=r"method 'triton' can not serve this call: dtype torch\.float64"):
        linear_attention(q.double(), k.double(), v.double(), method="triton")
    reasons = available_methods("cpu")
    assert list(reasons)[:2] == ["torch", "triton"] and reasons["torch"] is None


def test_batch_invariance_is_promised_by_triton_alone() -> None:
    q, k, v, _, _ = arguments(3, "none", grad=False)
    with pytest.raises(ValueError, match="batch_invariant is True with method 'torch', must be False there"):
        linear_attention(q, k, v, batch_invariant=True)
