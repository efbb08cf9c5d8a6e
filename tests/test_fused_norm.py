"""The kernels of RMSNorm, against float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_cases import DEVICE, DTYPES, TOLERANCE, poisoned, strided, with_gradients
from leet_hf.fused.norm import rms_norm

pytest.importorskip("triton")

EPS = 1e-3
# Where each step is rounded, so are three on the way to the result, and each by half a digit.
STEPS = {True: 3, False: 1}


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, weight: int, gated: bool, weight_dtype: Any = None
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """(x, weight over so many dims, or None, gate or None), and a gradient."""
    x, gate, dout = (strided(shape, dtype, layout, seed) for seed in range(3))
    w = 1 + 0.3 * strided(shape[-weight:], torch.float32, "contiguous", 3) if weight else None
    return (x * 2, None if w is None else w.to(weight_dtype or dtype), gate * 2 if gated else None), dout


def run(inputs: tuple[Tensor | None, ...], dout: Tensor, **options: Any) -> list[Tensor]:
    """The result, and the gradients of what there is of x, weight and gate."""
    given = [t is not None for t in inputs]

    def function(*leaves: Tensor) -> tuple[Tensor]:
        left = iter(leaves)
        x, weight, gate = (next(left) if there else None for there in given)
        return (rms_norm(x, weight, gate=gate, eps=EPS, **options),)

    leaves = tuple(t for t in inputs if t is not None)
    return with_gradients(function, leaves, (dout,))


def check(inputs: tuple[Tensor | None, ...], dout: Tensor, each: bool, activation: str) -> None:
    found = {}
    with poisoned():
        found = run(inputs, dout, each=each, activation=activation, method="triton")
    wide = tuple(None if t is None else t.double() for t in inputs)
    wanted = run(wide, dout.double(), each=each, activation=activation, method="torch")
    dtypes = [found[0].dtype, *(t.dtype for t in inputs if t is not None)]
    rows = inputs[0].shape[:-1].numel()
    for place, (got, want, dtype) in enumerate(zip(found, wanted, dtypes, strict=True)):
        assert got.dtype == dtype and got.shape == want.shape
        narrow = max(TOLERANCE[t.dtype] for t in inputs if t is not None)
        tolerance = STEPS[each] * (narrow if each or place == 0 else TOLERANCE[dtype])
        scale = want.abs().max().item() if want.numel() else 0
        if place == 2 and inputs[1] is not None:  # sums over rows
            tolerance, scale = tolerance * 2, scale + rows**0.5
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * max(scale, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", [True, False], ids=["each", "once"])
@pytest.mark.parametrize(
    ("shape", "layout", "weight", "activation"),
    [
        ((2, 3, 40), "contiguous", 1, None),
        ((2, 3, 37), "contiguous", 1, "silu"),
        ((1, 1500), "packed", 0, None),
        ((5, 1100), "odd", 1, "sigmoid"),
        ((2, 3, 4, 24), "heads first", 1, "sigmoid"),
        ((3, 3, 4, 16), "contiguous", 2, "silu"),
        ((2, 130, 3, 16), "packed", 2, None),
        ((70, 64), "contiguous", 0, "linear"),
        ((7,), "contiguous", 1, "sigmoid"),
        ((4, 1), "contiguous", 1, None),
        ((0, 8), "contiguous", 1, "silu"),
        ((3, 0), "contiguous", 1, None),
    ],
    ids=str,
)
def test_rms_norm(
    shape: tuple[int, ...], layout: str, weight: int, activation: str | None, each: bool, dtype: torch.dtype
) -> None:
    inputs, dout = arguments(shape, dtype, layout, weight, activation is not None)
    check(inputs, dout, each, activation or "linear")


@pytest.mark.parametrize("each", [True, False], ids=["each", "once"])
def test_dtypes_that_differ(each: bool) -> None:
    """Weights in float32 around activations in bfloat16, and float32 activations that end in bfloat16."""
    inputs, dout = arguments((3, 40), torch.bfloat16, "contiguous", 1, True, torch.float32)
    assert rms_norm(inputs[0], inputs[1], eps=EPS, method="triton").dtype == torch.float32
    check(inputs, dout.to(torch.float32 if each else torch.bfloat16), each, "sigmoid")
    x, weight, gate = inputs
    wide = x.float()
    out, want = (
        rms_norm(wide, weight, gate=gate, activation="silu", eps=EPS, each=False, dtype=torch.bfloat16, method=method)
        for method in ("triton", "torch")
    )
    assert out.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, rtol=2**-7, atol=2**-7)


def test_rounds_where_transformers_does() -> None:
    """Of results that are rounded at each step, hardly one differs from torch's; rounded once, many do."""
    inputs, _ = arguments((50, 64), torch.float16, "contiguous", 1, True)
    x, weight, gate = inputs
    want = rms_norm(x, weight, gate=gate, activation="sigmoid", eps=EPS, method="torch")
    each, once = (
        rms_norm(x, weight, gate=gate, activation="sigmoid", eps=EPS, each=e, method="triton") for e in (True, False)
    )
    assert (each != want).float().mean() < 0.01 < 0.1 < (once != want).float().mean()


def test_wide_rows_and_many_of_them() -> None:
    for shape in ((2, 16384), (67, 24)):
        inputs, dout = arguments(shape, torch.float32, "contiguous", 1, True)
        check(inputs, dout, False, "silu")
    x = torch.randn(1, 16385, device=DEVICE, requires_grad=True)
    out = rms_norm(x, eps=EPS, method="triton")  # wider than a program: torch
    assert out.grad_fn is not None and "Normed" not in out.grad_fn.name()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_row_of_zeros_and_no_eps() -> None:
    """Rows that only fill up a program give nothing to the weight's gradient, not even 0 * inf."""
    x = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    weight = torch.ones(24, device=DEVICE, requires_grad=True)
    rms_norm(x, weight, eps=0.0, method="triton").sum().backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()
    zeros = rms_norm(torch.zeros(2, 24, device=DEVICE), weight, eps=EPS, method="triton")
    assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("trained", ["x", "weight", "gate"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    inputs, dout = arguments((5, 40), torch.float32, "contiguous", 1, True)
    leaves = dict(zip(("x", "weight", "gate"), (t.detach().clone() for t in inputs), strict=True))
    leaves[trained].requires_grad_()
    found = []
    for method in ("triton", "torch"):
        out = rms_norm(**leaves, eps=EPS, activation="silu", each=False, method=method)
        found += torch.autograd.grad(out, leaves[trained], dout)
    torch.testing.assert_close(*found)


def test_repeats_bit_for_bit() -> None:
    inputs, dout = arguments((300, 96), torch.float32, "contiguous", 1, True)
    first, second = (run(inputs, dout, activation="sigmoid", method="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keeps_only_its_arguments() -> None:
    (x, weight, gate), _ = arguments((4, 16), torch.float32, "contiguous", 1, True)
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, gate=gate, activation="sigmoid", eps=EPS, method="triton")
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr(), gate.data_ptr()]


def test_no_second_derivative() -> None:
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (gradient,) = torch.autograd.grad(rms_norm(x, eps=EPS, method="triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled() -> None:
    torch._dynamo.reset()

    def two(x: Tensor, weight: Tensor, gate: Tensor, method: str) -> tuple[Tensor, ...]:
        h = rms_norm(x, weight, gate=gate, activation="sigmoid", eps=EPS, method=method)
        return h, rms_norm(h, eps=EPS, each=False, method=method)

    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens in (3, 5, 7):
        inputs, dout = arguments((2, tokens, 24), torch.float32, "contiguous", 1, True)
        results = [
            with_gradients(lambda *leaves, f=f, m=m: f(*leaves, method=m), inputs, (dout, dout))
            for f, m in ((compiled, "triton"), (two, "torch"))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operators() -> None:
    (x, weight, gate), dout = arguments((3, 2, 16), torch.float32, "packed", 2, True)
    settings = (EPS, "silu", True)
    for leaves in ((x, weight, gate), (x, None, None)):
        given = [None if t is None else t.detach().requires_grad_() for t in leaves]
        torch.library.opcheck(torch.ops.leet_hf.rms_norm.default, (*given, *settings, torch.float32))
    plain = (dout, *(t.detach() for t in (x, weight, gate)), *settings)
    for needs in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(torch.ops.leet_hf.rms_norm_backward.default, (*plain, *needs))
    dx, _, _ = torch.ops.leet_hf.rms_norm_backward(dout, x.detach().requires_grad_(), *plain[2:], True, True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_float64_and_transforms_take_the_formula() -> None:
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.ones(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, weight, eps=EPS, method="triton"), x)
    x = torch.randn(3, 8, device=DEVICE)
    jacobian = torch.func.jacrev(lambda t: rms_norm(t, eps=EPS, method="triton"))(x)
    assert jacobian.shape == (3, 8, 3, 8)


def test_refusals() -> None:
    x = torch.zeros(2, 8)
    for options, message in (
        ({"activation": "relu"}, "activation is 'relu', must be one of"),
        ({"weight": torch.ones(4)}, r"weight has shape \[4\], must be the last dim"),
        ({"weight": torch.ones(2, 2, 8)}, "weight has shape"),
        ({"gate": torch.ones(8)}, r"gate has shape \[8\], must be x's"),
        ({"x": torch.tensor(1.0)}, "x is a scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm(**{"x": x, "eps": EPS} | options)
