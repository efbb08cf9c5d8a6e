"""Rotary positions, gated linear units and split SiLU on a GPU: real sizes, odd strides, graphs, no waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
import tiny_retnet
from fused_cases import DTYPES, close, strided, with_gradients
from leet_hf import patch_model
from leet_hf.fused.glu import gated
from leet_hf.fused.rotary import turned
from leet_hf.fused.silu_split import silu_split

pytestmark = pytest.mark.gpu

LAYOUTS = ["contiguous", "packed", "odd", "heads first"]
# How each is called, and the shapes of its inputs and of its outputs' gradients.
Case = tuple[Callable[..., tuple[Tensor, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]


def rotary(kind: str, batch: int, tokens: int, dim: int, channels: int) -> Case:
    columns = channels if kind == "rope_twice" else channels // 2
    angles = torch.rand(1, tokens, 1, columns, generator=torch.Generator().manual_seed(3)).double() * 7
    cos, sin = (x.to("cuda", torch.float32) for x in (angles.cos(), angles.sin()))

    def run(q: Tensor, k: Tensor, method: str = "auto") -> tuple[Tensor, ...]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return turned(q, k, cos.to(wide), sin.to(wide), kind, method=method)

    shapes: list[tuple[int, ...]] = [(batch, tokens, 8, dim), (batch, tokens, 2, dim)]
    return run, shapes, shapes


def glu(activation: str, rows: int, inner: int) -> Case:
    def run(gate: Tensor, up: Tensor, method: str = "auto") -> tuple[Tensor, ...]:
        return (gated(gate, up, activation, method=method),)

    return run, [(2, rows, inner)] * 2, [(2, rows, inner)]


def split(tokens: int, heads: int, dim: int) -> Case:
    def run(packed: Tensor, method: str = "auto") -> tuple[Tensor, ...]:
        return silu_split(packed, dim, method=method)

    return run, [(2, tokens, heads * 3 * dim)], [(2, tokens, heads, dim)] * 3


CASES: dict[str, Callable[[], Case]] = {
    "rope": lambda: rotary("rope", 2, 1023, 256, 256),
    "one token": lambda: rotary("rope", 1, 1, 256, 256),
    "pairs": lambda: rotary("theta_shift", 2, 500, 256, 256),
    "pairs of no power": lambda: rotary("theta_shift", 2, 77, 80, 80),
    "part of the channels": lambda: rotary("rope_twice", 2, 333, 128, 64),
    "odd width": lambda: rotary("rope", 3, 100, 90, 42),
    "silu": lambda: glu("silu", 1000, 5632),
    "gelu": lambda: glu("gelu", 333, 5461),
    "split": lambda: split(1000, 16, 128),
    "split odd": lambda: split(77, 5, 45),
}


def data(case: Case, dtype: torch.dtype, layout: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    _, inputs, outputs = case
    made = [strided(shape, dtype, layout, seed) for seed, shape in enumerate(inputs + outputs)]
    return tuple(made[: len(inputs)]), tuple(made[len(inputs) :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_formula_and_runs_repeat(name: str, layout: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    inputs, gradients = data(case, dtype, layout)
    torch.use_deterministic_algorithms(True)  # memory from torch.empty comes filled with NaN
    try:
        found = with_gradients(case[0], inputs, gradients)
        again = with_gradients(case[0], inputs, gradients)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    close(found, case[0], inputs, gradients)  # float64 is computed by torch


@pytest.mark.parametrize("name", CASES)
def test_graph_replay_with_changed_inputs(name: str) -> None:
    case = CASES[name]()
    inputs, gradients = data(case, torch.bfloat16, "contiguous")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        with_gradients(case[0], inputs, gradients)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = with_gradients(case[0], inputs, gradients)
    for x in (*inputs, *gradients):
        x.normal_()
    graph.replay()
    for a, b in zip(found, with_gradients(case[0], inputs, gradients), strict=True):
        assert torch.equal(a, b)


def test_no_synchronisation() -> None:
    cases = [(case, *data(case, torch.bfloat16, "packed")) for case in (make() for make in CASES.values())]
    for case, inputs, gradients in cases:
        with_gradients(case[0], inputs, gradients)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case, inputs, gradients in cases:
            with_gradients(case[0], inputs, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_entries_than_32_bits_count() -> None:
    """Offsets past 2^31, in rows of a packed projection and in a single long row."""
    gate = torch.randn(2**31 // 4096 + 3, 2 * 4096, device="cuda", dtype=torch.bfloat16)
    for a, b in (gate.chunk(2, dim=-1), (gate.flatten()[: 2**31 + 64], gate.flatten()[-(2**31) - 64 :])):
        found = gated(a, b, "silu")
        torch.testing.assert_close(found[-2:], F.silu(a[-2:].float()).mul(b[-2:].float()).bfloat16())


def test_compiled() -> None:
    for name in ("rope", "silu", "split"):
        torch._dynamo.reset()
        case = CASES[name]()
        inputs, gradients = data(case, torch.float32, "contiguous")
        compiled = torch.compile(case[0], fullgraph=True)
        wanted = with_gradients(case[0], inputs, gradients)
        for a, b in zip(with_gradients(compiled, inputs, gradients), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*tiny_retnet.KINDS, "minimax"])
def test_models_are_what_they_are_without_kernels(kind: str) -> None:
    """Logits and gradients in float32 with every kernel, and with the formulas in torch."""
    results = []
    for method in ("auto", "torch"):
        if kind == "minimax":
            model = patch_model(tiny.model(num_experts_per_tok=4).cuda(), method=method)
        else:
            model = tiny_retnet.model(kind, method=method).cuda()
        ids = torch.tensor(tiny.prompts((33, 33)), device="cuda")
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        results.append([outputs.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-3 * b.norm() + 1e-6
