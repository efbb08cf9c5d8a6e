"""Linear layers of one input in one launch: in Triton's interpreter and on a GPU; which are joined, and when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from leet_hf.fused import joined
from leet_hf.fused.joined import Joined, joined_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("width", [64, 300, 2048])
@pytest.mark.parametrize("sizes", [(16, 40), (2048, 1, 65), (2048, 2048, 4096, 4096)], ids=str)
def test_products_on_a_gpu(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype) -> None:
    _right(sizes, width, rows, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("sizes", "width"), [((16, 40), 64), ((70, 1, 33), 150), ((5, 6, 7, 8), 24)], ids=str)
def test_products(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype) -> None:
    _right(sizes, width, rows, dtype)


def _right(sizes: tuple[int, ...], width: int, rows: int, dtype: torch.dtype) -> None:
    x = numbers(rows, 1, width, dtype=dtype)
    weights = [numbers(size, width, dtype=dtype, seed=i + 1) for i, size in enumerate(sizes)]
    for out, weight in zip(joined_linear(x, weights), weights, strict=True):
        want = F.linear(x.double(), weight.double())
        assert out.shape == want.shape and out.dtype == dtype and out.is_contiguous()
        error = (out.double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert error.item() < (4e-3 if dtype == torch.bfloat16 else 5e-4)


class Block(nn.Module):
    def __init__(self, many: int = 3) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(32, 16 + i, bias=False) for i in range(many))
        self.last = nn.Linear(16, 32, bias=False)
        self.between: Any = lambda x: None

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (self._one(i, x) for i in range(len(self.into)))
        return x + self.last(first) + sum(out[..., :1] for out in others)

    def _one(self, i: int, x: Tensor) -> Tensor:
        if i == 1:
            self.between(x)
        return self.into[i](x)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each launch had."""
    made: list[int] = []

    def counted(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        made.append(len(weights))
        return joined_linear(x, weights)

    monkeypatch.setattr(joined, "joined_linear", counted)
    return made


def _blocks(many: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Block(many), Block(many)).to(DEVICE, torch.bfloat16).requires_grad_(False)


def _close(got: Tensor, want: Tensor) -> None:
    assert (got - want).float().square().mean().sqrt() <= 0.01 * want.float().square().mean().sqrt()


@pytest.mark.parametrize("many", [2, 3, 4, 5, 6])
def test_what_shares_an_input_is_joined(many: int, launches: list[int]) -> None:
    model, mode = _blocks(many), Joined(DEVICE)
    want = {2: [2], 3: [3], 4: [4], 5: [4], 6: [4, 2]}[many] * 2
    for seed in range(3):
        x = numbers(2, 1, 32, seed=seed)
        launches.clear()
        with mode:
            got = model(x)
        assert launches == want  # the first time to compile them
        _close(got, model(x))


def test_an_input_written_to_in_between(launches: list[int]) -> None:
    model, mode = _blocks(), Joined(DEVICE)
    with mode:
        model(numbers(1, 32))
    model[0].between = model[1].between = lambda x: x.mul_(2)
    with mode:
        got = model(numbers(1, 32))
    _close(got, model(numbers(1, 32)))
    launches.clear()
    fresh = Joined(DEVICE)
    with fresh:
        model(numbers(1, 32))
    assert launches == [2, 2]  # the two after the change


def test_another_order_and_other_weights() -> None:
    model, mode = _blocks(), Joined(DEVICE)
    with mode:
        model(numbers(1, 32))
    for block in model:
        fresh = nn.Linear(32, 17, bias=False).to(DEVICE, torch.bfloat16)
        block.into = nn.ModuleList([block.into[2], fresh, block.into[0]])
        block.last = nn.Linear(18, 32, bias=False).to(DEVICE, torch.bfloat16)
    with mode, torch.no_grad():
        got = model(numbers(1, 32))
    _close(got, model(numbers(1, 32)))


@pytest.mark.parametrize("why", ["rows", "dtype", "bias", "strides"])
def test_what_is_left_alone(why: str, launches: list[int]) -> None:
    model = _blocks()
    x = numbers(17 if why == "rows" else 2, 32)
    if why == "dtype":
        model, x = model.float(), x.float()
    if why == "bias":
        for block in model:
            for layer in block.into:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=DEVICE, dtype=torch.bfloat16))
    if why == "strides":
        x = torch.cat([x, x], -1)[:, ::2]
        for block in model:
            for layer in block.into:
                layer.weight = nn.Parameter(layer.weight.T.contiguous().T)
    mode = Joined(DEVICE)
    for _ in range(2):
        with mode:
            got = model(x)
    assert not launches
    assert torch.equal(got, model(x))


def test_inference_mode(launches: list[int]) -> None:
    model, mode = _blocks(), Joined(DEVICE)
    with torch.inference_mode():
        for _ in range(2):
            with mode:
                got = model(numbers(1, 32))
        _close(got, model(numbers(1, 32)))
    assert launches == [3, 3] * 2


def test_an_error_in_the_first_run_leaves_no_plan(launches: list[int]) -> None:
    model, mode = _blocks(), Joined(DEVICE)
    model[1].between = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), mode:
        model(numbers(1, 32))
    model[1].between = lambda x: None
    with mode:
        model(numbers(1, 32))
    assert launches == [3, 3]
