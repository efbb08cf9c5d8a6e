"""Every named algorithm of the collection against the float64 oracle, by itself and as a method of linear_attention.

The Triton forms run in Triton's interpreter where there is no GPU, at tiny shapes; the shapes they are made for are in
the tests behind the marker `gpu`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from leet_linear_attention import (
    DecodeState,
    available_methods,
    linear_attention,
    linear_attention_step,
    methods,
    reference,
)
from leet_linear_attention.methods import lightning, recursion
from operator_cases import Case, Inputs, assert_close, error, make_inputs, run, run_oracle

ON_TRITON = [name for name in methods.NAMES if name.endswith("_triton")]
IN_TORCH = [name for name in methods.NAMES if name not in ON_TRITON]
COMPILED = torch.cuda.is_available()
TRITON_DEVICE = "cuda" if COMPILED else "cpu"
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def device_of(method: str) -> str:
    return TRITON_DEVICE if method in ON_TRITON else "cpu"


@pytest.fixture(params=methods.NAMES)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in ON_TRITON:
        pytest.importorskip("triton")
    return name


# Lengths around the blocks of every form: 1 and 2, powers of two and their neighbours, squares and theirs.
CASES = [
    Case(tokens=0),
    Case(tokens=1, decay="head"),
    Case(tokens=2, decay="none", initial=False),
    Case(tokens=63, key_dim=3, value_dim=7, heads=(4, 2, 2, 4)),
    Case(tokens=64, key_dim=40, value_dim=24, decay="head", heads=(1, 1, 4, 4), dtype=BF16),
    Case(tokens=65, key_dim=1, value_dim=100, heads=(2, 1, 1, 4), dtype=FP16),
    Case(tokens=255, decay="none", heads=(1, 2, 4, 1), dtype=FP16),
    Case(tokens=257, decay="head", initial=False, dtype=BF16),
    Case(tokens=300, decay="reset", key_dim=24),
    Case(tokens=513, decay="head", batch=1),
    Case(tokens=600, decay="token", dtype=FP64, batch=1),
    Case(tokens=300, decay="none", packed=True, dtype=FP16),
    Case(tokens=301, decay="head", packed=True, heads=(4, 2, 2, 1)),
    Case(tokens=700, decay="token", packed=True, heads=(2, 2, 2, 2), dtype=FP64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_forms(name: str, case: Case) -> None:
    x = make_inputs(case, "cpu")
    assert_close(x, name, run_oracle(x))


SMALL_CASES = [
    Case(tokens=0),
    Case(tokens=1, decay="head", key_dim=3, dtype=BF16),
    Case(tokens=35, decay="none", heads=(2, 1, 2, 2), batch=1, dtype=FP16),
    Case(tokens=32, decay="head", key_dim=9, value_dim=20, heads=(1, 2, 2, 2), batch=1),
    Case(tokens=33, decay="token", key_dim=5, value_dim=17, heads=(2, 2, 1, 1), batch=1, dtype=BF16),
    Case(tokens=37, decay="token", key_dim=4, value_dim=3, heads=(1, 2, 4, 1), batch=1),
    Case(tokens=40, decay="reset", packed=True, key_dim=3, heads=(2, 1, 2, 2)),
    Case(tokens=41, decay="head", packed=True, initial=False, key_dim=2, dtype=FP16),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
@pytest.mark.parametrize("name", ON_TRITON)
def test_triton_forms(name: str, case: Case) -> None:
    pytest.importorskip("triton")
    x = make_inputs(case, TRITON_DEVICE)
    assert_close(x, name, run_oracle(x))


def tiny(method: str, **more: object) -> Inputs:
    """Few numbers for the interpreter, some more for the torch forms."""
    small = method in ON_TRITON and not COMPILED
    case = Case(tokens=20, key_dim=3, value_dim=5, batch=1) if small else Case(tokens=150, key_dim=24, value_dim=40)
    return make_inputs(dataclasses.replace(case, **more), device_of(method))


def test_fast_decay(method: str) -> None:
    """At -30 a token nothing may be divided by a power of the decay, and gradients keep their digits."""
    x = tiny(method, decay="fast", initial=False)
    assert_close(x, method, run_oracle(x, reference.recurrent))


@pytest.mark.parametrize("name", [*IN_TORCH, "causal_dot_product_triton"])
def test_slow_decay_does_not_drift(name: str) -> None:
    """One rounded factor, applied thousands of times, would cost float32 a digit or two."""
    if name in ON_TRITON:
        pytest.importorskip("triton")
    tokens = 600 if name in ON_TRITON and not COMPILED else 5000
    x = make_inputs(Case(tokens, 4, 4, decay="none", batch=1, initial=True), device_of(name))
    assert x.initial_state is not None
    x.initial_state *= 100  # what is left of it shows the product of all factors
    x.log_decay = torch.tensor([-3e-4, -1.1e-3], device=x.q.device)
    o, final = linear_attention(
        x.q, x.k, x.v, x.log_decay, initial_state=x.initial_state, output_final_state=True, method=name
    )
    wanted, wanted_final = reference.recurrent(
        x.q, x.k, x.v, x.log_decay, initial_state=x.initial_state, output_final_state=True
    )
    assert final is not None and wanted_final is not None
    assert max(error(o, wanted), error(final, wanted_final)) < 2e-6


def test_strides_and_unwritten_memory(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tiny(method, heads=(3, 3, 3, 3))
    oracle = run_oracle(x)
    x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    x.k = torch.cat([x.k, x.k], -1)[..., : x.k.shape[-1]]
    x.v = x.v.transpose(2, 3).contiguous().transpose(2, 3)
    assert x.log_decay is not None
    x.log_decay = x.log_decay.transpose(0, 2).contiguous().transpose(0, 2)

    def poison(make):  # type: ignore[no-untyped-def]
        def made(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    assert_close(x, method, oracle)


def test_arguments_stay_as_they_were(method: str) -> None:
    x = tiny(method)
    before = [t.clone() for t in x.differentiable()]
    run(linear_attention, x, method=method)
    for t, was in zip(x.differentiable(), before, strict=True):
        assert torch.equal(t, was)


def test_nan_stays_in_its_sequence(method: str) -> None:
    x = tiny(method, packed=True)
    tokens = x.q.shape[1]
    x.cu_seqlens = torch.tensor([0, 7, 9, tokens], device=x.q.device)
    assert x.initial_state is not None
    x.initial_state, x.dfinal = x.initial_state[:3].clone(), x.dfinal[:3].clone()
    clean = run(linear_attention, x, method=method)
    x.v[:, 8] = float("nan")
    spoiled = run(linear_attention, x, method=method)
    for name, kept in (("o", [*range(7), *range(9, tokens)]), ("final_state", [0, 2])):
        axis = 1 if name == "o" else 0
        index = torch.tensor(kept, device=x.q.device)
        assert torch.equal(clean[name].index_select(axis, index), spoiled[name].index_select(axis, index))
        assert not spoiled[name].isfinite().all()


def test_same_bits_every_time(method: str) -> None:
    x = tiny(method, packed=True)
    first, second = (run(linear_attention, x, method=method) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", IN_TORCH)
def test_autocast_and_tf32_change_nothing(name: str) -> None:
    x = tiny(name)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=BF16):
            assert_close(x, name, run_oracle(x))
    finally:
        torch.set_float32_matmul_precision(before)


def test_named_and_default_steps_agree(method: str) -> None:
    """A decode state filled by steps under a name is what the name computes for the sequence."""
    x = tiny(method, decay="head", dtype=torch.float32)
    tokens, batch, heads = 9, x.q.shape[0], 2
    q, k, v = (t[:, :tokens] for t in (x.q, x.k, x.v))
    state = DecodeState.allocate(
        batch, heads, k.shape[-1], v.shape[-1], buffer=4, dtype=torch.float32, device=x.q.device
    )
    steps = [
        linear_attention_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], x.log_decay, state, method=method)
        for t in range(tokens)
    ]
    o, final = linear_attention(q, k, v, x.log_decay, output_final_state=True, method=method)
    torch.testing.assert_close(torch.cat(steps, 1), o, rtol=1e-4, atol=1e-5)
    assert final is not None
    torch.testing.assert_close(state.fold(), final, rtol=1e-4, atol=1e-5)


def test_traced_into_one_graph(method: str) -> None:
    x = tiny(method)

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return linear_attention(q, k, v, g, method=method)[0].square().sum()

    torch._dynamo.reset()
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.log_decay) if t is not None]
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(traced(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_names_are_listed_after_the_default_order() -> None:
    assert list(available_methods("cpu")) == ["torch", "triton", *methods.NAMES]
    assert list(available_methods("cuda")) == ["triton", "torch", *methods.NAMES]
    assert all(available_methods("cpu", FP64)[name] is None for name in IN_TORCH)
    assert all("float64" in str(available_methods("cuda", FP64)[name]) for name in ON_TRITON)


def test_triton_forms_without_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = make_inputs(Case(tokens=3), "cpu")
    for name in ON_TRITON:
        with pytest.raises(ValueError, match=rf"method '{name}' can not serve.*(on the CPU|not installed).*'auto'"):
            linear_attention(x.q, x.k, x.v, x.log_decay, method=name)


def flops(name: str, tokens: int, key_dim: int, value_dim: int) -> int:
    """Of the matrix products of one forward of one head."""
    q, k = (torch.randn(1, tokens, 1, key_dim) for _ in range(2))
    v = torch.randn(1, tokens, 1, value_dim)
    with FlopCounterMode(display=False) as counter:
        importlib.import_module(f"leet_linear_attention.methods.{name}").forward(
            q, k, v, -torch.rand(1), None, None, 1.0, True
        )
    return counter.get_total_flops()


def test_flops_are_those_of_the_algorithm() -> None:
    """What tells the algorithms apart, and what their docstrings and the README's table say."""
    K, V = 48, 32
    for tokens in (1024, 4096):
        block, leaf, levels = lightning.BLOCK, recursion.LEAF, math.log2(tokens / recursion.LEAF)
        state = 2 * tokens * K * V
        assert flops("vanilla", tokens, K, V) == 2 * tokens**2 * (K + V) + state
        assert flops("lightning", tokens, K, V) == 2 * tokens * (block * (K + V) + 2 * K * V)
        assert flops("recursion", tokens, K, V) == 2 * tokens * (leaf * (K + V) + K * V * (1 + levels / 2))
        # the products with the state; the rest is elementwise
        assert flops("causal_dot_product", tokens, K, V) == state
        assert flops("block_based", tokens, K, V) == 2 * state
        assert flops("fleet", tokens, K, V) == 0
