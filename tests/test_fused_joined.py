"""Linear layers of one input in one launch, a pair with its gated unit, a sum with its norm: interpreter and GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from fused_cases import DEVICE, numbers
from leet_hf.fused import norm
from leet_hf.fused.glu import gated
from leet_hf.fused.joined import gated_linear, joined_linear


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("width", [64, 300, 2048])
@pytest.mark.parametrize("sizes", [(40,), (2048,), (7000,), (16, 40), (2048, 1, 65), (2048, 2048, 4096, 4096)], ids=str)
def test_products_on_a_gpu(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype) -> None:
    _right(sizes, width, rows, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("sizes", "width"), [((40,), 64), ((16, 40), 64), ((70, 1, 33), 150), ((5, 6, 7, 8), 24)], ids=str
)
def test_products(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype) -> None:
    _right(sizes, width, rows, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_weights_that_begin_anywhere(rows: int) -> None:
    _right((40, 64, 33), 256, rows, torch.bfloat16, first=1)


def _right(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype, first: int = 0) -> None:
    x = numbers(rows, 1, width, dtype=dtype)
    weights = [
        numbers(size * width + first, dtype=dtype, seed=i + 1)[first:].view(size, width) for i, size in enumerate(sizes)
    ]
    for out, weight in zip(joined_linear(x, weights), weights, strict=True):
        want = F.linear(x.double(), weight.double())
        assert out.shape == want.shape and out.dtype == dtype and out.is_contiguous()
        error = (out.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error.item() < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "size"), [(1, 64, 16), (16, 150, 33), (3, 24, 70)])
def test_a_pair_and_its_unit(rows: int, width: int, size: int, dtype: torch.dtype, activation: str) -> None:
    _right_pair(rows, width, size, dtype, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "size"), [(1, 2048, 5632), (16, 300, 65), (8, 64, 70)])
def test_a_pair_and_its_unit_on_a_gpu(rows: int, width: int, size: int, dtype: torch.dtype, activation: str) -> None:
    _right_pair(rows, width, size, dtype, activation)


def _right_pair(rows: int, width: int, size: int, dtype: torch.dtype, activation: str) -> None:
    x = numbers(rows, width, dtype=dtype)
    weights = [numbers(size, width, dtype=dtype, seed=i + 1) / width**0.5 for i in range(2)]
    gate, up, result = gated_linear(x, *weights, activation)
    for out, weight in zip((gate, up), weights, strict=True):
        want = F.linear(x.double(), weight.double())
        error = (out.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert out.dtype == dtype and error.item() < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    # Of what was rounded: as a launch of its own gives it.
    kind = torch.finfo(dtype)
    want = gated(gate, up, activation, method="triton")
    torch.testing.assert_close(result, want, rtol=kind.eps, atol=kind.eps * kind.smallest_normal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("weight_of", [None, (48,), (3, 48)], ids=str)
def test_a_sum_and_its_norm(weight_of: Any, each: bool, dtype: torch.dtype) -> None:
    x, other = (numbers(2, 5, 3, 48, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = None if weight_of is None else numbers(*weight_of, dtype=dtype, seed=3)
    total, normed = norm.of_sum(x, other, weight, 1e-5, each, dtype)
    want = norm.rms_norm(total, weight, eps=1e-5, each=each, dtype=dtype, method="triton")
    if DEVICE == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds
        torch.testing.assert_close(total, x + other, rtol=2**-7, atol=0)
        torch.testing.assert_close(normed, want, rtol=2**-6, atol=1e-2)
    else:
        assert torch.equal(total, x + other)
        assert torch.equal(normed, want)
