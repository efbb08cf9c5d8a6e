"""Cases of the operator, made, run and measured the same way for every method: shared by the operator's tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import leet_linear_attention as package
from leet_linear_attention import reference

# RMS of the difference over RMS of the oracle, for outputs, states and gradients.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
NAMES = ("o", "final_state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def targets(*more: tuple[str, str]) -> list:  # type: ignore[type-arg]
    """(device, method) pairs for parametrize: torch on the CPU; on a GPU, behind the marker `gpu`, every method."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    on_gpu = [pytest.param(("cuda", m), marks=[pytest.mark.gpu, missing], id=f"cuda-{m}") for m in ("triton", "torch")]
    return [pytest.param(t, id="-".join(t)) for t in (("cpu", "torch"), *more)] + on_gpu


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and log_decay for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(found: Tensor, oracle: Tensor) -> float:
    """RMS(found - oracle) / RMS(oracle); the absolute RMS where the oracle is below fp32's range; NaN is infinite."""
    if oracle.numel() == 0:
        return 0.0
    found, oracle = found.double().cpu(), oracle.double().cpu()
    difference = (found - oracle).pow(2).mean().sqrt().item()
    size = oracle.pow(2).mean().sqrt().item()
    if difference != difference:
        return float("inf")
    return difference / size if size > torch.finfo(torch.float32).tiny else difference


@dataclass(frozen=True)
class Case:
    """One call: heads are those of (q, k, v, log_decay), packed gives sequence lengths as parts of T."""

    tokens: int = 65
    key_dim: int = 16
    value_dim: int = 16
    heads: tuple[int, int, int, int] = (2, 2, 2, 2)
    decay: str = "token"  # none, head, token, fast (all about -30), reset (slow, with -104 here and there)
    packed: bool = False
    initial: bool = True
    dtype: torch.dtype = torch.float32
    batch: int = 2
    scale: float | None = None

    def __str__(self) -> str:
        parts = [f"T{self.tokens}", f"K{self.key_dim}", f"V{self.value_dim}", "h" + "".join(map(str, self.heads))]
        parts += [self.decay, "packed" if self.packed else "rows", "state" if self.initial else "zero"]
        return "-".join([*parts, str(self.dtype).removeprefix("torch.")])


@dataclass
class Inputs:
    """Arguments of one call and the gradients coming into it."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    do: Tensor
    dfinal: Tensor

    def differentiable(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.log_decay, self.initial_state) if x is not None]


def make_log_decay(kind: str, shape: tuple[int, int, int], random: torch.Generator) -> Tensor | None:
    """float64 log-decays from 0 to -30 per token: None, `[H]` for "head", else `[B, T, H]`."""
    heads = shape[-1]
    if kind == "none":
        return None
    if kind == "head":
        return torch.tensor([0.0, -30.0, -1e-3, -0.7, -3.0, -1e-5, -0.05, -10.0], dtype=torch.float64)[:heads].clone()
    uniform = torch.rand(shape, generator=random, dtype=torch.float64)
    if kind == "fast":
        return -30 + 2 * uniform
    if kind == "reset":
        return torch.where(uniform < 0.05, -104.0, -0.02 * uniform)
    assert kind == "token", kind
    mixed = -(10 ** (uniform * 5.4771 - 4))  # evenly spread in the exponent, -1e-4 to -30
    return torch.where(torch.rand(shape, generator=random) < 0.2, 0.0, mixed)


def make_cu_seqlens(tokens: int) -> Tensor:
    """Uneven sequences, with empty ones at the start, in the middle and at the end."""
    inside = [0, tokens // 7, tokens // 7, tokens // 3, tokens // 3 + min(1, tokens - tokens // 3)]
    return torch.tensor([0, *inside, tokens, tokens], dtype=torch.int32)


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    batch = 1 if case.packed else case.batch
    hq, hk, hv, hg = case.heads
    heads = max(hq, hk, hv, 1 if case.decay == "none" else hg)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    log_decay = make_log_decay(case.decay, (batch, case.tokens, hg), random)
    cu_seqlens = make_cu_seqlens(case.tokens).to(device) if case.packed else None
    rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state = (rows, heads, case.key_dim, case.value_dim)
    return Inputs(
        q=normal(batch, case.tokens, hq, case.key_dim),
        k=normal(batch, case.tokens, hk, case.key_dim),
        v=normal(batch, case.tokens, hv, case.value_dim),
        log_decay=None if log_decay is None else log_decay.to(device, wide(case.dtype)),
        initial_state=normal(*state, dtype=wide(case.dtype)) if case.initial else None,
        cu_seqlens=cu_seqlens,
        scale=case.key_dim**-0.5 if case.scale is None else case.scale,
        do=normal(batch, case.tokens, heads, case.value_dim),
        dfinal=normal(*state, dtype=wide(case.dtype)),
    )


def run(function: Callable[..., tuple[Tensor, Tensor | None]], x: Inputs, **more: object) -> dict[str, Tensor]:
    """Outputs, final state and every gradient (through both) of `function`, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in x.differentiable()]
    given = iter(leaves)
    q, k, v = next(given), next(given), next(given)
    log_decay = None if x.log_decay is None else next(given)
    initial = None if x.initial_state is None else next(given)
    o, final = function(
        q,
        k,
        v,
        log_decay,
        scale=x.scale,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=x.cu_seqlens,
        **more,
    )
    assert final is not None
    incoming = [(o, x.do.to(o.dtype)), (final, x.dfinal.to(final.dtype))]
    reached, incoming = zip(*[pair for pair in incoming if pair[0].requires_grad], strict=True)
    grads = torch.autograd.grad(reached, leaves, incoming, allow_unused=True, materialize_grads=True)
    names = ["dq", "dk", "dv"]
    names += [] if log_decay is None else ["dlog_decay"]
    names += [] if initial is None else ["dinitial_state"]
    return {"o": o.detach(), "final_state": final.detach(), **dict(zip(names, grads, strict=True))}


def run_oracle(x: Inputs, form: Callable[..., tuple[Tensor, Tensor | None]] | None = None) -> dict[str, Tensor]:
    """The same from the float64 oracle, on the values as rounded to the case's dtype.

    By default by the quadratic form; for a few tokens by the recurrent, whose zeros are exact.
    """
    if form is None:
        form = reference.recurrent if x.q.shape[1] <= 2 else reference.quadratic

    def exact(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double()

    q, k, v = x.q.double(), x.k.double(), x.v.double()
    rounded = Inputs(
        q, k, v, exact(x.log_decay), exact(x.initial_state), x.cu_seqlens, x.scale, x.do.double(), x.dfinal.double()
    )
    return run(form, rounded)


def errors(x: Inputs, method: str, oracle: dict[str, Tensor]) -> dict[str, float]:
    """Error of every result of `linear_attention` by `method`, after checking its shape and dtype."""
    found = run(package.linear_attention, x, method=method)
    assert found.keys() == oracle.keys()
    for name, value in found.items():
        assert value.shape == oracle[name].shape, f"{name} has shape {value.shape}, not {oracle[name].shape}"
        expected = wide(x.q.dtype) if "state" in name or "decay" in name else x.q.dtype
        assert value.dtype == expected, f"{name} is {value.dtype}, not {expected}"
    return {name: error(value, oracle[name]) for name, value in found.items()}


def assert_close(x: Inputs, method: str, oracle: dict[str, Tensor]) -> None:
    tolerance = TOLERANCE[x.q.dtype]
    wrong = {name: f"{e:.1e}" for name, e in errors(x, method, oracle).items() if not e <= tolerance}
    assert not wrong, f"error above {tolerance}: {wrong}"


def covering_cases() -> list[Case]:
    """Cases in which every two values of different axes meet at least once (greedy, always the same)."""
    axes: dict[str, list] = {  # type: ignore[type-arg]
        "tokens": [0, 1, 2, 63, 64, 65, 257, 1000],
        "key_dim": [16, 40, 64, 100, 128, 256],
        "value_dim": [16, 40, 64, 100, 128, 256],
        "decay": ["none", "head", "token", "reset"],
        "heads": [(2, 2, 2, 2), (4, 2, 2, 4), (1, 1, 4, 4), (2, 1, 1, 4), (1, 2, 4, 1)],
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "packed": [False, True],
        "initial": [False, True],
    }
    names = list(axes)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
    }  # every pair of values still to meet

    def pairs(chosen: dict[str, object]) -> set[tuple[object, ...]]:
        return {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations([n for n in names if n in chosen], 2)}

    cases = []
    while missing:
        a, x, b, y = min(missing, key=str)
        chosen = {a: x, b: y}
        for name in names:
            if name not in chosen:
                chosen[name] = max(axes[name], key=lambda value: len(pairs({**chosen, name: value}) & missing))
        missing -= pairs(chosen)
        cases.append(Case(**chosen, batch=1 if chosen["tokens"] == 1000 else 2))
    return cases
