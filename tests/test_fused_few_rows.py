"""Linear layers of few rows: in Triton's interpreter and on a GPU, and where they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from leet_hf.fused.few_rows import MOST_ROWS, FewRows, few_rows_linear, serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {torch.bfloat16: 1.5e-2 if DEVICE == "cpu" else 4e-3, torch.float16: 1e-3}  # the interpreter cuts bfloat16


def layer(rows: int, width: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, width), torch.randn(outputs, width) * width**-0.5, torch.randn(outputs)
    return tuple(t.to(DEVICE, dtype) for t in (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 40, 24), (3, 520, 33), (16, 264, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_is_linear(rows: int, width: int, outputs: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = layer(rows, width, outputs, dtype)
    given = bias if biased else None
    got = few_rows_linear(x[:, None], weight, given)
    want = F.linear(x[:, None].double(), weight.double(), None if given is None else given.double())
    assert got.dtype == dtype and got.shape == want.shape
    assert ((got.double() - want).norm() / want.norm()).item() <= LIMIT[dtype]


def test_others_go_the_usual_way(monkeypatch: Any) -> None:
    x, weight, bias = layer(2, 40, 24, torch.bfloat16)
    taken = []
    monkeypatch.setattr("leet_hf.fused.few_rows.serves", lambda *a: serves(*a) or taken.append(a))
    with FewRows(), torch.no_grad():
        assert F.linear(x.float(), weight.float(), bias.float()).dtype == torch.float32
        assert F.linear(x, weight, bias=bias).shape == (2, 24)  # by keyword: as it was called
    assert len(taken) == 1
    many, odd = layer(MOST_ROWS + 1, 40, 24, torch.bfloat16), layer(1, 36, 24, torch.bfloat16)
    with torch.no_grad():
        assert not serves(*many) and not serves(*odd) and not serves(x.float(), weight.float(), None)
        assert not serves(x, weight.t().contiguous().t(), None)
    if DEVICE == "cuda":
        assert not serves(x, weight, bias), "gradients are recorded here"


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 2048, 6144), (8, 4096, 2048), (16, 5632, 32000)])
def test_large_ones_on_a_gpu(rows: int, width: int, outputs: int) -> None:
    x, weight, bias = layer(rows, width, outputs, torch.bfloat16)
    linear = torch.nn.Linear(width, outputs, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.copy_(weight), linear.bias.copy_(bias)
        want = F.linear(x.double(), weight.double(), bias.double())
        assert serves(x, linear.weight, linear.bias)
        with FewRows():
            got = linear(x)
            assert torch.equal(got, linear(x))
    assert ((got.double() - want).norm() / want.norm()).item() <= LIMIT[torch.bfloat16]
