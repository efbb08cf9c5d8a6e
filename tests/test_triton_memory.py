"""What the passes for the gradients need besides lies in gradients that are not written yet, where it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from leet_linear_attention import linear_attention
from operator_cases import Case, errors, make_inputs, run_oracle
from test_triton import DEVICE, check

pytest.importorskip("triton")

from leet_linear_attention.triton.launch import Sweep
from leet_linear_attention.triton.operands import ChunkStates


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """states: the chunk states' places; spared: whether the memory given for a sum served, call by call."""
    found: dict[str, list[Any]] = {"states": [], "spared": []}
    places, written = Sweep.chunk_states, Sweep.written

    def noted_places(self: Sweep, *arguments: Any) -> ChunkStates:
        found["states"].append(places(self, *arguments))
        return found["states"][-1]

    def noted_written(self: Sweep, out: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        memory = written(self, out, spare)
        if memory is not out:
            found["spared"].append(spare is not None and memory.data_ptr() == spare.data_ptr())
        return memory

    monkeypatch.setattr(Sweep, "chunk_states", noted_places)
    monkeypatch.setattr(Sweep, "written", noted_written)
    yield found


@pytest.mark.parametrize(
    ("case", "lent"),
    [
        (Case(tokens=130, decay="token", key_dim=24, value_dim=72), True),  # rows in both gradients
        (Case(tokens=128, decay="token", key_dim=72, value_dim=40), True),  # rows in dk alone
        (Case(tokens=200, decay="head", key_dim=40, value_dim=100, batch=1), True),  # in segments
        (Case(tokens=190, decay="reset", key_dim=24, value_dim=96, packed=True, heads=(2, 1, 2, 2)), True),
        (Case(tokens=70, decay="token", key_dim=104, value_dim=100), False),  # rows of dv are too short
        (Case(tokens=70, decay="token", key_dim=24, value_dim=136), False),
    ],
    ids=str,
)
def test_chunk_states(case: Case, lent: bool, seen: dict[str, list[Any]]) -> None:
    x = make_inputs(Case(**{**case.__dict__, "dtype": torch.bfloat16}), DEVICE)
    check(errors(x, "triton", run_oracle(x)), torch.bfloat16)
    (states,) = seen["states"]
    assert (states.near is not None) == lent
    if lent:
        assert states.states.shape[0] <= (x.cu_seqlens.shape[0] - 1 if case.packed else x.q.shape[0])


@pytest.mark.parametrize(
    ("case", "spared"),
    [
        (Case(tokens=70, decay="none", heads=(2, 1, 1, 2)), [True, True]),  # dk and dv in the memory of dq
        (Case(tokens=70, decay="none", heads=(1, 1, 2, 2)), [True, True]),  # dq and dk in that of dv
        (Case(tokens=70, decay="none", heads=(2, 1, 1, 2), key_dim=24, value_dim=40), [False, True]),  # dv's is wider
        (Case(tokens=70, decay="none", batch=1, key_dim=24, value_dim=512), [True, True]),  # parts of 256 rows
        (Case(tokens=70, decay="none", batch=1, key_dim=512, value_dim=24), [False, True]),  # of the output too
        (Case(tokens=70, decay="none", heads=(2, 1, 2, 2), batch=1, key_dim=24, value_dim=512), [True, True]),
        (Case(tokens=70, decay="none", heads=(2, 1, 1, 2), batch=1, key_dim=24, value_dim=512), [True, True, False]),
    ],
    ids=str,
)
def test_summands(case: Case, spared: list[bool], seen: dict[str, list[Any]]) -> None:
    x = make_inputs(Case(**{**case.__dict__, "dtype": torch.bfloat16}), DEVICE)
    check(errors(x, "triton", run_oracle(x)), torch.bfloat16)
    assert seen["spared"] == spared


def test_parts_in_float16_are_summed_in_float32(seen: dict[str, list[Any]]) -> None:
    case = Case(tokens=70, decay="none", heads=(2, 1, 2, 2), batch=1, key_dim=24, value_dim=512, dtype=torch.float16)
    x = make_inputs(case, DEVICE)
    check(errors(x, "triton", run_oracle(x)), torch.float16)
    assert seen["spared"] == [False, False]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "per_token"),
    [((2, 8192, 16, 16, 128, 128), True), ((2, 8192, 32, 8, 128, 128), False), ((2, 4096, 8, 8, 256, 512), False),
     ((2, 4096, 8, 8, 512, 256), False), ((1, 8200, 16, 16, 64, 128), True), ((1, 8200, 16, 16, 128, 64), True)],
    ids=str,
)  # fmt: skip
def test_gradients_take_no_memory_but_their_own(shape: tuple[int, ...], per_token: bool) -> None:
    batch, tokens, heads, heads_kv, key_dim, value_dim = shape
    x = [
        torch.randn(batch, tokens, number, width, device="cuda", dtype=torch.bfloat16)
        for number, width in ((heads, key_dim), (heads_kv, key_dim), (heads_kv, value_dim))
    ]
    g = -torch.rand(*((batch, tokens, heads) if per_token else (heads,)), device="cuda") * 0.2
    leaves = [t.requires_grad_() for t in (*x, *([g] if per_token else []))]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = linear_attention(*x, g, scale=key_dim**-0.5)[0]
    do = torch.ones_like(o)
    gradients = torch.autograd.grad(o, leaves, do)
    own = sum(t.numel() * t.element_size() for t in (o, do, *gradients))
    inputs_ = sum(t.numel() * t.element_size() for t in leaves)
    assert torch.cuda.max_memory_allocated() - before - own <= 0.05 * (own + inputs_)
