"""linear_attention against the float64 oracle: outputs, states and every gradient, over what it promises to serve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from leet_linear_attention import chunking, linear_attention, reference
from operator_cases import (
    NAMES,
    TOLERANCE,
    Case,
    Inputs,
    assert_close,
    covering_cases,
    error,
    errors,
    make_inputs,
    run,
    run_oracle,
    targets,
)

TARGETS = pytest.mark.parametrize("target", targets())


@TARGETS
@pytest.mark.parametrize("case", covering_cases(), ids=str)
def test_error_table(case: Case, target: tuple[str, str]) -> None:
    device, method = target
    x = make_inputs(case, device)
    assert_close(x, method, run_oracle(x))


def test_covering_cases_hold_every_pair_of_dims() -> None:
    found = {(c.key_dim, c.value_dim) for c in covering_cases()}
    assert len(found) == 36


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_fast_decay_gradients_keep_their_digits(target: tuple[str, str], packed: bool, dtype: torch.dtype) -> None:
    """At -30 per token the gradient of log_decay is about 1e-13: any difference of larger sums would bury it."""
    device, method = target
    x = make_inputs(Case(tokens=70, decay="fast", packed=packed, dtype=dtype), device)
    assert_close(x, method, run_oracle(x, reference.recurrent))


@TARGETS
@pytest.mark.parametrize("tokens", [65, 257])
def test_each_head_is_right_by_itself(target: tuple[str, str], tokens: int) -> None:
    """A head that keeps everything must not hide the error of one that forgets at once."""
    device, method = target
    x = make_inputs(Case(tokens=tokens, heads=(8, 8, 8, 8), decay="head", initial=False, batch=1), device)
    oracle = run_oracle(x, reference.recurrent)
    found = run(linear_attention, x, method=method)
    for name, axis in (("o", 2), ("dq", 2), ("dk", 2), ("dv", 2), ("final_state", 1), ("dlog_decay", 0)):
        for head in range(8):
            e = error(found[name].select(axis, head), oracle[name].select(axis, head))
            assert e <= TOLERANCE[torch.float32], (name, head, e)


@pytest.fixture(scope="module")
def long() -> tuple[Inputs, dict[str, torch.Tensor]]:
    """T = 20000, decays that reach over thousands of tokens: heads 0, 1 keep theirs, 2, 3 change it every token."""
    tokens = 20000
    # Values that bf16 holds exactly, so that one oracle serves every dtype.
    x = make_inputs(Case(tokens, heads=(4, 4, 4, 4), decay="none", dtype=torch.bfloat16, batch=1), "cpu")
    x.log_decay = -4e-4 * torch.rand(1, tokens, 4, generator=torch.manual_seed(1))
    x.log_decay[..., :2] = torch.tensor([-1e-4, -3e-4])
    return x, run_oracle(x, reference.recurrent)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", ["head", "token"])
def test_long_and_slow(target: tuple[str, str], decay: str, dtype: torch.dtype, long: tuple) -> None:
    device, method = target
    first = 0 if decay == "head" else 2
    x, oracle = long
    here = {n: t.narrow(1 if "state" in n else 2, first, 2) for n, t in oracle.items()}
    log_decay = x.log_decay.narrow(2, first, 2)
    if decay == "head":
        log_decay = log_decay[0, 0]
        here["dlog_decay"] = here["dlog_decay"].sum((0, 1))
    q, k, v, do = (t.narrow(2, first, 2).to(device, dtype) for t in (x.q, x.k, x.v, x.do))
    state, dfinal = (t.narrow(1, first, 2).to(device) for t in (x.initial_state, x.dfinal))
    assert_close(Inputs(q, k, v, log_decay.to(device), state, None, x.scale, do, dfinal), method, here)


@TARGETS
def test_many_short_sequences(target: tuple[str, str]) -> None:
    device, method = target
    x = make_inputs(Case(tokens=300, packed=True), device)
    lengths = torch.randint(0, 5, (150,), generator=torch.manual_seed(0))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).clamp(max=300)
    bounds[-1] = 300
    x.cu_seqlens = bounds.to(device)
    x.initial_state = torch.randn(150, 2, 16, 16, device=device)
    x.dfinal = torch.randn(150, 2, 16, 16, device=device)
    assert_close(x, method, run_oracle(x))


@TARGETS
def test_strides(target: tuple[str, str]) -> None:
    """Transposed, sliced, broadcast and not unit-stride inputs and incoming gradients give what copies give."""
    device, method = target
    x = make_inputs(Case(tokens=70, heads=(3, 3, 3, 3)), device)
    oracle = run_oracle(x)
    x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
    x.k = torch.cat([x.k, x.k], -1)[..., :16]
    x.v = x.v.transpose(2, 3).contiguous().transpose(2, 3)
    x.log_decay = x.log_decay.transpose(0, 2).contiguous().transpose(0, 2)
    x.do = x.do.transpose(1, 3).contiguous().transpose(1, 3)
    for name, e in errors(x, method, oracle).items():
        assert e <= TOLERANCE[torch.float32], (name, e)
    x.do = torch.ones(1, 1, 1, 1, device=device).expand_as(x.do)
    assert_close(x, method, run_oracle(x))


@TARGETS
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_uninitialised_memory_is_never_read(
    target: tuple[str, str], decay: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, method = target
    x = make_inputs(Case(tokens=150, key_dim=40, heads=(1, 2, 4, 2), decay=decay, packed=packed), device)
    oracle = run_oracle(x)

    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    assert_close(x, method, oracle)


@TARGETS
def test_nan_stays_in_its_sequence(target: tuple[str, str]) -> None:
    device, method = target
    x = make_inputs(Case(tokens=200, packed=True, initial=True), device)
    x.cu_seqlens = torch.tensor([0, 70, 75, 130, 200], device=device)
    x.initial_state, x.dfinal = x.initial_state[:4].clone(), x.dfinal[:4].clone()
    clean = run(linear_attention, x, method=method)
    x.v[:, 72] = float("nan")
    x.initial_state[1] = float("inf")
    spoiled = run(linear_attention, x, method=method)
    keep = torch.ones(200, dtype=torch.bool, device=device)
    keep[70:75] = False
    for name in ("o", "dq", "dk", "dv", "dlog_decay"):
        assert torch.equal(clean[name][:, keep], spoiled[name][:, keep]), name
    for name in ("final_state", "dinitial_state"):
        assert torch.equal(clean[name][[0, 2, 3]], spoiled[name][[0, 2, 3]]), name


BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@contextmanager
def loose_precision(device: str, by_backend: bool) -> Iterator[None]:
    """Everything a caller can switch on to make matrix products less exact, by either of torch's two ways."""
    before, own = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in BACKENDS]
    try:
        if by_backend:
            for backend, precision in zip(BACKENDS, ("tf32", "bf16"), strict=True):
                backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype=torch.bfloat16):
            yield
    finally:
        for backend, precision in zip(BACKENDS, own, strict=True):
            backend.fp32_precision = precision
        torch.set_float32_matmul_precision(before)


@TARGETS
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("by_backend", [False, True], ids=["for all", "by backend"])
def test_autocast_and_tf32_change_nothing(target: tuple[str, str], decay: str, by_backend: bool) -> None:
    device, method = target
    x = make_inputs(Case(tokens=200, key_dim=64, value_dim=64, decay=decay), device)
    oracle = run_oracle(x)
    with loose_precision(device, by_backend):
        assert_close(x, method, oracle)
        assert [backend.fp32_precision for backend in BACKENDS] == ["tf32", "bf16"]
        assert by_backend or torch.get_float32_matmul_precision() == "medium"


def test_short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk per segment: the state, its gradient and the ends of sequences pass through every hand-over."""
    monkeypatch.setattr(chunking, "SEGMENT_NUMBERS", {"cpu": 1})
    for packed in (False, True):
        x = make_inputs(Case(tokens=200, packed=packed), "cpu")
        assert_close(x, "torch", run_oracle(x))


@TARGETS
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_same_bits_every_time(target: tuple[str, str], packed: bool) -> None:
    device, method = target
    x = make_inputs(Case(tokens=257, packed=packed, heads=(4, 2, 2, 1)), device)
    first, second = (run(linear_attention, x, method=method) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@TARGETS
def test_only_what_is_asked_for(target: tuple[str, str]) -> None:
    device, method = target
    x = make_inputs(Case(tokens=70), device)
    o, final = linear_attention(x.q, x.k, x.v, x.log_decay, method=method)
    assert final is None and not o.requires_grad
    v = x.v.clone().requires_grad_()
    log_decay = x.log_decay.clone()
    o, _ = linear_attention(x.q, x.k, v, log_decay, method=method)
    (dv,) = torch.autograd.grad(o.sum(), v)
    x.do, x.dfinal, x.initial_state, x.scale = torch.ones_like(x.do), torch.zeros_like(x.dfinal), None, 1.0
    assert error(dv, run_oracle(x)["dv"]) <= TOLERANCE[torch.float32]


@TARGETS
def test_gradient_through_the_final_state_alone(target: tuple[str, str]) -> None:
    device, method = target
    x = make_inputs(Case(tokens=130, decay="head"), device)
    x.do = torch.zeros_like(x.do)
    oracle = run_oracle(x)
    leaves = [t.clone().requires_grad_() for t in (x.k, x.v, x.log_decay, x.initial_state)]
    k, v, log_decay, state = leaves
    _, final = linear_attention(
        x.q, k, v, log_decay, initial_state=state, output_final_state=True, scale=x.scale, method=method
    )
    grads = torch.autograd.grad(final, leaves, x.dfinal)
    for name, grad in zip(("dk", "dv", "dlog_decay", "dinitial_state"), grads, strict=True):
        assert error(grad, oracle[name]) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradcheck(decay: str, packed: bool) -> None:
    case = Case(6, 3, 2, (1, 2, 2, 1), decay, packed, True, torch.float64, batch=2, scale=0.7)
    x = make_inputs(case, "cpu")
    if x.log_decay is not None:
        x.log_decay = x.log_decay.clamp(-2, -0.1)  # away from 0, past which finite differences would step
    leaves = [t.requires_grad_() for t in x.differentiable()]

    def function(*leaves: torch.Tensor):
        q, k, v, *rest = leaves
        log_decay = rest[0] if x.log_decay is not None else None
        return linear_attention(
            q,
            k,
            v,
            log_decay,
            scale=x.scale,
            initial_state=rest[-1],
            output_final_state=True,
            cu_seqlens=x.cu_seqlens,
            method="torch",
        )

    assert torch.autograd.gradcheck(function, leaves)


@TARGETS
def test_float64_is_float64(target: tuple[str, str]) -> None:
    device, _ = target
    x = make_inputs(Case(tokens=300, heads=(2, 1, 4, 2), packed=True, dtype=torch.float64), device)
    found = errors(x, "torch", run_oracle(x))
    assert set(found) == set(NAMES)
    assert max(found.values()) < TOLERANCE[torch.float64], found


def test_checks_and_call_trace_into_one_graph() -> None:
    x = make_inputs(Case(tokens=70, packed=True), "cpu")

    def function(q, k, v, log_decay, state, bounds):
        return linear_attention(q, k, v, log_decay, initial_state=state, output_final_state=True, cu_seqlens=bounds)

    arguments = (x.q, x.k, x.v, x.log_decay, x.initial_state, x.cu_seqlens)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(*arguments), function(*arguments), strict=True):
        assert torch.equal(found, expected)
