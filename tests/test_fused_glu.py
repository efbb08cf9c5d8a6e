"""The kernels of gated linear units and of a split SiLU, against float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from fused_cases import DTYPES, close, poisoned, strided, with_gradients
from leet_hf.fused.glu import activation_name, gated
from leet_hf.fused.silu_split import silu_split

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 40), "contiguous"),
        ((2, 3, 37), "contiguous"),
        ((1, 1, 1500), "packed"),
        ((2, 2, 1100), "odd"),
        ((2, 3, 4, 24), "heads first"),
        ((7,), "contiguous"),
    ],
    ids=str,
)
def test_gated(shape: tuple[int, ...], layout: str, activation: str, dtype: torch.dtype) -> None:
    gate, up, dout = (strided(shape, dtype, layout, seed) for seed in range(3))
    gate = gate * 3  # the bends of the activations
    with poisoned():
        found = with_gradients(lambda g, u: (gated(g, u, activation, method="triton"),), (gate, up), (dout,))
    close(found, lambda g, u: (gated(g, u, activation, method="torch"),), (gate, up), (dout,))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_far_out(activation: str) -> None:
    """Where exponentials overflow: no NaN, and what the formula gives."""
    gate = torch.tensor([-3e38, -1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    up = torch.ones_like(gate)
    found, wanted = (
        with_gradients(lambda g, u: (gated(g, u, activation, method=method),), (gate, up), (up,))  # noqa: B023
        for method in ("triton", "torch")
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float32),
        ("contiguous", torch.bfloat16),
        ("packed", torch.float16),
        ("odd", torch.bfloat16),
        ("heads first", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(("heads", "dim"), [(2, 8), (3, 20)])
def test_silu_split(heads: int, dim: int, layout: str, dtype: torch.dtype) -> None:
    """layout: of the gradients, as autograd hands them over, and of the projection."""
    packed = strided((2, 3, heads * 3 * dim), dtype, "contiguous" if layout == "heads first" else layout, 0)
    gradients = tuple(strided((2, 3, heads, dim), dtype, layout, seed) for seed in (1, 2, 3))
    with poisoned():
        found = with_gradients(partial(silu_split, dim=dim, method="triton"), (packed,), gradients)
    assert found[0].data_ptr() + dim * packed.element_size() == found[1].data_ptr(), "one SiLU, three views of it"
    close(found, partial(silu_split, dim=dim, method="torch"), (packed,), gradients)


def test_silu_split_with_a_part_unused() -> None:
    packed = strided((1, 2, 24), torch.float32, "contiguous", 0).requires_grad_()
    gradients = []
    for method in ("triton", "torch"):
        _, k, _ = silu_split(packed, 4, method=method)
        gradients += torch.autograd.grad(k.square().sum(), packed)
    torch.testing.assert_close(*gradients)


def test_silu_split_keeps_only_the_projection() -> None:
    packed = strided((1, 2, 24), torch.float32, "contiguous", 0).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        silu_split(packed, 4, method="triton")
    assert [x.data_ptr() for x in kept] == [packed.data_ptr()]


def test_gated_keeps_only_gate_and_up() -> None:
    gate, up = (strided((2, 8), torch.float32, "contiguous", seed).requires_grad_() for seed in (0, 1))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated(gate, up, "silu", method="triton")
    assert [x.data_ptr() for x in kept] == [gate.data_ptr(), up.data_ptr()]


def test_no_second_derivative() -> None:
    x = strided((1, 2, 24), torch.float32, "contiguous", 0).requires_grad_()
    for out in (gated(x, x, "silu", method="triton"), silu_split(x, 4, method="triton")[0]):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_compiled(activation: str) -> None:
    torch._dynamo.reset()

    def run(g: torch.Tensor, u: torch.Tensor, method: str) -> tuple[torch.Tensor, ...]:
        return gated(g, u, activation, method=method), *silu_split(g, 4, method=method)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens in (3, 5, 7):
        inputs = tuple(strided((2, tokens, 24), torch.float32, "contiguous", seed) for seed in (0, 1))
        out = (inputs[0], *(strided((2, tokens, 2, 4), torch.float32, "contiguous", seed) for seed in (2, 3, 4)))
        results = [
            with_gradients(partial(f, method=method), inputs, out)
            for f, method in ((compiled, "triton"), (run, "torch"))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operators() -> None:
    gate, up, dout = (strided((2, 8), torch.float32, "packed", seed).requires_grad_() for seed in range(3))
    torch.library.opcheck(torch.ops.leet_hf.gated.default, (gate, up, "gelu"))
    plain = (x.detach() for x in (dout, gate, up))
    torch.library.opcheck(torch.ops.leet_hf.gated_backward.default, (*plain, "silu"))
    made = torch.ops.leet_hf.gated_backward(dout, gate, up, "silu")
    with pytest.raises(RuntimeError, match="no second derivative"):
        made[0].sum().backward()


def test_activation_names() -> None:
    names = {name: activation_name(ACT2FN[name]) for name in ("silu", "swish", "gelu", "gelu_new", "relu")}
    assert names == {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": None, "relu": None}
    assert activation_name(nn.GELU()) == "gelu" and activation_name(nn.GELU(approximate="tanh")) is None
    assert activation_name(F.silu) == "silu" and activation_name(torch.tanh) is None


def test_refusals() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="activation is 'relu', must be one of"):
        gated(x, x, "relu")
    with pytest.raises(ValueError, match="packed has shape"):
        silu_split(x, 3)
