"""What a step does in one launch: linear layers of one input, their gated unit, a sum and its norm; and when not.

In Triton's interpreter and on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from fused_cases import DEVICE, numbers
from leet_hf.fused import joined, norm
from leet_hf.fused.glu import gated
from leet_hf.fused.joined import joined_linear
from leet_hf.fused.learned import Learned
from leet_linear_attention.triton.launcher import overlapping


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
    model, mode = _blocks(many), Learned(DEVICE)
    want = {2: [2], 3: [3], 4: [4], 5: [4], 6: [4, 2]}[many] * 2
    for seed in range(3):
        x = numbers(2, 1, 32, seed=seed)
        launches.clear()
        with mode:
            got = model(x)
        assert launches == want  # the first time to compile them
        _close(got, model(x))


def test_a_layer_alone_is_taken_with_a_single_row(launches: list[int]) -> None:
    model, mode = _blocks(), Learned(DEVICE)
    for seed in range(2):
        launches.clear()
        with mode:
            got = model(numbers(1, 1, 32, seed=seed))
        assert sorted(launches) == [1, 1, 3, 3]
        _close(got, model(numbers(1, 1, 32, seed=seed)))


def test_float32_is_taken_with_several_rows(launches: list[int]) -> None:
    model = _blocks().float()
    for rows in (1, 2, 7, 16):
        mode = Learned(DEVICE)
        for seed in range(2):
            launches.clear()
            x = numbers(rows, 32, seed=seed).float()
            with mode:
                got = model(x)
            assert sorted(launches) == ([] if rows == 1 else [1, 1, 3, 3])
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)


def test_who_allows_tf32_gets_it(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "products_are_exact", lambda: False)
    model, mode = _blocks().float(), Learned(DEVICE)
    for _ in range(2):
        with mode:
            model(numbers(4, 32).float())
    assert not launches


def test_a_pair_of_float32_is_two_layers() -> None:
    weights = [numbers(32, 24, seed=i).float() for i in range(2)]
    x = numbers(3, 24).float()

    def run() -> Tensor:
        return gated(*[nn.functional.linear(x, weight) for weight in weights], "silu", method="triton")

    mode = Learned(DEVICE)
    for _ in range(2):
        with mode, torch.no_grad():
            got = run()
        torch.testing.assert_close(got, run(), rtol=1e-5, atol=1e-5)


def test_an_input_written_to_in_between(launches: list[int]) -> None:
    model, mode = _blocks(), Learned(DEVICE)
    with mode:
        model(numbers(2, 32))
    model[0].between = model[1].between = lambda x: x.mul_(2)
    with mode:
        got = model(numbers(2, 32))
    _close(got, model(numbers(2, 32)))
    launches.clear()
    fresh = Learned(DEVICE)
    with fresh:
        model(numbers(2, 32))
    assert launches == [2, 2]  # the two after the change


@pytest.mark.parametrize("rows", [1, 2])
def test_another_order_and_other_weights(rows: int) -> None:
    model, mode = _blocks(), Learned(DEVICE)
    with mode:
        model(numbers(rows, 32))
    for block in model:
        fresh = nn.Linear(32, 17, bias=False).to(DEVICE, torch.bfloat16)
        block.into = nn.ModuleList([block.into[2], fresh, block.into[0]])
        block.last = nn.Linear(18, 32, bias=False).to(DEVICE, torch.bfloat16)
    with mode, torch.no_grad():
        got = model(numbers(rows, 32))
    _close(got, model(numbers(rows, 32)))


@pytest.mark.parametrize("why", ["rows", "dtype", "bias", "strides"])
def test_what_is_left_alone(why: str, launches: list[int]) -> None:
    model = _blocks()
    x = numbers(17 if why == "rows" else 2, 32)
    if why == "dtype":
        model, x = model.double(), x.double()
    if why == "bias":
        for block in model:
            for layer in block.into:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=DEVICE, dtype=torch.bfloat16))
    if why == "strides":
        x = torch.cat([x, x], -1)[:, ::2]
        for block in model:
            for layer in block.into:
                layer.weight = nn.Parameter(layer.weight.T.contiguous().T)
    mode = Learned(DEVICE)
    for _ in range(2):
        with mode:
            got = model(x)
    assert not launches
    assert torch.equal(got, model(x))


def test_inference_mode(launches: list[int]) -> None:
    model, mode = _blocks(), Learned(DEVICE)
    with torch.inference_mode():
        for _ in range(2):
            with mode:
                got = model(numbers(2, 32))
        _close(got, model(numbers(2, 32)))
    assert launches == [3, 3] * 2


def test_an_error_in_the_first_run_leaves_no_plan(launches: list[int]) -> None:
    model, mode = _blocks(), Learned(DEVICE)
    model[1].between = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), mode:
        model(numbers(2, 32))
    model[1].between = lambda x: None
    with mode:
        model(numbers(2, 32))
    assert launches == [3, 3]


class Gated(nn.Module):
    """A layer as decoders have them: norm, gated unit of two linear layers, and a sum whose norm comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 48, False), nn.Linear(32, 48, False), nn.Linear(48, 32, False)
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 32))
        self.between: Any = lambda x: None

    def forward(self, x: Tensor) -> Tensor:
        normed = norm.rms_norm(x, self.weight, eps=1e-6, method="triton")
        gate, up = self.gate(normed), self.up(normed)
        self.between(gate)
        total = x + self.down(gated(gate, up, "silu", method="triton"))
        self.between(total)
        return total


class Used:
    """Counts what is launched together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units = self.norms = 0
        unit, sum_norm = joined.gated_linear, norm.of_sum

        def a_unit(*arguments: Any) -> Any:
            self.units += 1
            return unit(*arguments)

        def a_norm(*arguments: Any) -> Any:
            self.norms += 1
            return sum_norm(*arguments)

        monkeypatch.setattr(joined, "gated_linear", a_unit)
        monkeypatch.setattr(norm, "of_sum", a_norm)


def _layers() -> nn.Sequential:
    """In float16, which Triton's interpreter rounds to as a GPU does; bfloat16 it cuts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Gated(), Gated(), Gated()).to(DEVICE, torch.float16).requires_grad_(False)


def test_units_and_norms_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mode, used = _layers(), Learned(DEVICE), Used(monkeypatch)
    for seed in range(3):
        x = numbers(2, 1, 32, dtype=torch.float16, seed=seed)
        used.units = used.norms = 0
        with mode, torch.no_grad():
            got = model(x)
        assert (used.units, used.norms) == (3, 2)  # the last sum has no norm; the first time to compile them
        _close(got, model(x))


@pytest.mark.parametrize("what", ["written to", "another model"])
def test_what_was_computed_early_is_not_taken_for_something_else(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mode, x = _layers(), Learned(DEVICE), numbers(2, 32, dtype=torch.float16)
    with mode, torch.no_grad():
        model(x)
    if what == "written to":
        for layer in model:
            layer.between = lambda x: x.mul_(1.5)
    else:
        model = nn.Sequential(*[model[i] for i in (2, 0, 1)])
        model[1].weight = nn.Parameter(model[1].weight * 2)
        model[2].gate, model[2].up = model[2].up, model[2].gate
    used = Used(monkeypatch)
    with mode, torch.no_grad():
        got = model(x)
    assert used.norms == 2
    _close(got, model(x))


@pytest.mark.gpu
def test_launches_that_begin_early_change_nothing() -> None:
    """A long chain, recorded and replayed on one input after another: what it is in turns, to rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [Gated() for _ in range(24)]
        for layer in layers:
            layer.gate, layer.up = nn.Linear(1024, 3000, False), nn.Linear(1024, 3000, False)
            layer.down, layer.weight = nn.Linear(3000, 1024, False), nn.Parameter(torch.rand(1024) + 0.5)
    model = nn.Sequential(*layers).to(DEVICE, torch.bfloat16).requires_grad_(False)
    for rows in (1, 7, 16):
        x, mode = numbers(rows, 1024), Learned(DEVICE)
        with torch.no_grad():
            with overlapping(x.device), mode:
                model(x)  # looks, and compiles
            with overlapping(x.device), mode:
                early = model(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph), overlapping(x.device), mode:
                recorded = model(x)
            in_turns = Learned(DEVICE)
            with in_turns:
                model(x)
            graph.replay()
            assert torch.equal(early, recorded)
            for seed in range(20):
                x.copy_(numbers(rows, 1024, seed=seed))
                graph.replay()
                with in_turns:
                    _close(recorded, model(x))
