"""Laws of the operator, on cases hypothesis thinks up."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leet_linear_attention import linear_attention, reference
from operator_cases import Case, Inputs, error, make_inputs, targets

TARGETS = pytest.mark.parametrize("target", targets())
LAWS = settings(max_examples=30, deadline=None)

heads = st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 2), (4, 2, 2, 4), (1, 1, 3, 3), (2, 1, 4, 1)])
cases = st.builds(
    Case,
    tokens=st.integers(1, 200),
    key_dim=st.integers(1, 40),
    value_dim=st.integers(1, 40),
    heads=heads,
    decay=st.sampled_from(["none", "head", "token", "reset"]),
    batch=st.integers(1, 3),
)
seeds = st.integers(0, 2**16)


def setup(case: Case, target: tuple[str, str], seed: int) -> tuple[Inputs, float]:
    """float64 by torch, where laws hold to many digits; float32 by the kernels."""
    exact = target[1] == "torch"
    x = make_inputs(Case(**{**vars(case), "dtype": torch.float64 if exact else torch.float32}), target[0], seed)
    return x, 1e-11 if exact else 1e-5


def call(x: Inputs, target: tuple[str, str], **changed: object) -> tuple[torch.Tensor, torch.Tensor]:
    a = {**vars(x), **changed}
    o, final = linear_attention(
        a["q"],
        a["k"],
        a["v"],
        a["log_decay"],
        scale=a["scale"],
        initial_state=a["initial_state"],
        output_final_state=True,
        cu_seqlens=a["cu_seqlens"],
        method=target[1],
    )
    assert final is not None
    return o, final


def tokens(x: Inputs, begin: int, end: int) -> dict[str, object]:
    """The arguments of tokens begin to end."""
    log_decay = x.log_decay
    if log_decay is not None and log_decay.dim() == 3:
        log_decay = log_decay[:, begin:end]
    return {"q": x.q[:, begin:end], "k": x.k[:, begin:end], "v": x.v[:, begin:end], "log_decay": log_decay}


@TARGETS
@LAWS
@given(case=cases, seed=seeds, data=st.data())
def test_split_anywhere_and_carry_the_state(target, case, seed, data) -> None:
    x, tolerance = setup(case, target, seed)
    at = data.draw(st.integers(0, case.tokens))
    whole, final = call(x, target)
    head, state = call(x, target, **tokens(x, 0, at))
    tail, end = call(x, target, **{**tokens(x, at, case.tokens), "initial_state": state})
    assert error(torch.cat([head, tail], 1), whole) < tolerance
    assert error(end, final) < tolerance


@TARGETS
@LAWS
@given(case=cases, seed=seeds, data=st.data())
def test_packed_is_separate(target, case, seed, data) -> None:
    x, tolerance = setup(Case(**{**vars(case), "batch": 1}), target, seed)
    inside = data.draw(st.lists(st.integers(0, case.tokens), max_size=6).map(sorted))
    bounds = [0, *inside, case.tokens]
    states = torch.cat([x.initial_state * (n + 1) for n in range(len(bounds) - 1)])
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
    packed = torch.tensor(bounds, dtype=kind, device=target[0])
    o, final = call(x, target, cu_seqlens=packed, initial_state=states)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone, state = call(x, target, **{**tokens(x, begin, end), "initial_state": states[n : n + 1]})
        assert error(o[:, begin:end], alone) < tolerance
        assert error(final[n : n + 1], state) < tolerance


@TARGETS
@LAWS
@given(case=cases, seed=seeds, factor=st.floats(-4, 4))
def test_linear_in_values_and_state(target, case, seed, factor) -> None:
    x, tolerance = setup(case, target, seed)
    v, state = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    one, other = call(x, target), call(x, target, v=v, initial_state=state)
    both = call(x, target, v=x.v + factor * v, initial_state=x.initial_state + factor * state)
    for a, b, c in zip(one, other, both, strict=True):
        size = a.pow(2).mean().sqrt() + (factor * b).pow(2).mean().sqrt()
        assert (c - a - factor * b).pow(2).mean().sqrt() < tolerance * (size + 1e-9)


@TARGETS
@LAWS
@given(case=cases, seed=seeds, factor=st.floats(-3, 3))
def test_scale_is_a_factor_on_the_output_alone(target, case, seed, factor) -> None:
    x, tolerance = setup(case, target, seed)
    (one, state), (scaled, same) = call(x, target, scale=1.0), call(x, target, scale=factor)
    assert (scaled - factor * one).pow(2).mean().sqrt() <= tolerance * (1e-9 + one.pow(2).mean().sqrt())
    assert torch.equal(state, same)


@TARGETS
@LAWS
@given(case=cases, seed=seeds)
def test_rows_do_not_meet(target, case, seed) -> None:
    x, tolerance = setup(Case(**{**vars(case), "batch": 3}), target, seed)
    order = torch.tensor([2, 0, 1], device=target[0])
    moved = {n: getattr(x, n)[order] for n in ("q", "k", "v", "initial_state")}
    if x.log_decay is not None and x.log_decay.dim() == 3:
        moved["log_decay"] = x.log_decay[order]
    for straight, permuted in zip(call(x, target), call(x, target, **moved), strict=True):
        assert error(permuted, straight[order]) < tolerance


@TARGETS
@LAWS
@given(case=cases, seed=seeds, data=st.data())
def test_the_future_does_not_reach_back(target, case, seed, data) -> None:
    x, _ = setup(case, target, seed)
    at = data.draw(st.integers(0, case.tokens))
    changed = {name: getattr(x, name).clone() for name in ("q", "k", "v")}
    for t in changed.values():
        t[:, at:] += 1
    assert error(call(x, target, **changed)[0][:, :at], call(x, target)[0][:, :at]) < 1e-12


@TARGETS
@LAWS
@given(case=cases, seed=seeds)
def test_heads_repeated_or_shared(target, case, seed) -> None:
    """Grouped heads are the same as repeated ones, a log-decay per head the same as one repeated for every token."""
    x, tolerance = setup(case, target, seed)
    h = x.initial_state.shape[1]
    repeated = {n: getattr(x, n).repeat_interleave(h // getattr(x, n).shape[2], 2) for n in ("q", "k", "v")}
    if x.log_decay is not None:
        per_token = x.log_decay.expand(x.q.shape[0], case.tokens, -1)
        repeated["log_decay"] = per_token.repeat_interleave(h // per_token.shape[2], 2)
    for shared, alone in zip(call(x, target), call(x, target, **repeated), strict=True):
        assert error(alone, shared) < tolerance


@TARGETS
@LAWS
@given(case=cases, seed=seeds)
def test_oracle(target, case, seed) -> None:
    x, tolerance = setup(case, target, seed)
    form = reference.recurrent if seed % 2 else reference.quadratic
    oracle = form(x.q, x.k, x.v, x.log_decay, scale=x.scale, initial_state=x.initial_state, output_final_state=True)
    for found, expected in zip(call(x, target), oracle, strict=True):
        assert error(found, expected) < tolerance
