"""What tests of fused functions share: tensors of odd strides, poisoned memory, an oracle in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
# One rounding of the result; float32 also sums and takes exponentials. Triton's interpreter cuts float32 to bfloat16
# where hardware rounds, which doubles that dtype's error.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 if COMPILED else 2**-7, torch.float16: 2**-11}

Function = Callable[..., tuple[Tensor, ...]]


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random entries, contiguous."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Random entries. layout: "contiguous"; "packed", a part of wider rows; "odd", whose rows begin anywhere;
    "heads first", with the second and third dimensions stored the other way round."""
    made = numbers(*shape, dtype=dtype, seed=seed)
    if layout == "heads first":
        return made.transpose(1, 2).contiguous().transpose(1, 2)
    before = {"contiguous": 0, "packed": 16, "odd": 3}[layout]
    wide = torch.full((*shape[:-1], shape[-1] + 2 * before), float("nan"), dtype=dtype, device=DEVICE)
    part = wide[..., before : before + shape[-1]]
    return part.copy_(made) if before else made


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from `new_empty` comes filled with NaN."""
    empty = Tensor.new_empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    Tensor.new_empty = filled  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.new_empty = empty  # type: ignore[method-assign]


def with_gradients(function: Function, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs of a function and the gradients of its inputs, for gradients of its outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, gradients))]


def close(found: list[Tensor], function: Function, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> None:
    """Assert that results are the oracle's, which is the function of float64 copies, to one rounding of each entry."""
    wide = tuple(tuple(x.double() for x in tensors) for tensors in (inputs, gradients))
    for got, wanted in zip(found, with_gradients(function, *wide), strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == inputs[0].dtype
        tolerance = TOLERANCE[got.dtype]
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=2 * tolerance)
