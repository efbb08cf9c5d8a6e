"""The Triton kernels in Triton's interpreter at small shapes, so that a machine without a GPU guards them too.

With a GPU the same cases run compiled, next to the full table of test_operator.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from leet_linear_attention import DecodeState, linear_attention, linear_attention_step, reference
from leet_linear_attention.triton.launcher import _overlap, overlapping
from operator_cases import TOLERANCE, Case, error, errors, make_inputs, run, run_oracle

pytest.importorskip("triton")

COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
# The interpreter cuts float32 to bfloat16 where hardware rounds, which doubles that dtype's error.
LIMIT = TOLERANCE if COMPILED else {**TOLERANCE, torch.bfloat16: 1.5e-2}


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    """Errors within `LIMIT`; in compiled bfloat16 twice that for log_decay's gradient: few sums that mostly cancel."""
    double = {"dlog_decay"} if COMPILED and dtype == torch.bfloat16 else set()
    wrong = {name: e for name, e in found.items() if not e <= LIMIT[dtype] * (2 if name in double else 1)}
    assert not wrong, wrong


CASES = [
    Case(tokens=0),
    Case(tokens=1, decay="head"),
    Case(tokens=65, decay="none", heads=(2, 1, 2, 2)),
    Case(tokens=70, decay="head", key_dim=40, value_dim=24, heads=(1, 2, 2, 2)),
    Case(tokens=70, decay="token", key_dim=24, value_dim=40, heads=(2, 2, 1, 1)),
    Case(tokens=70, decay="fast", initial=False),
    Case(tokens=90, decay="reset", packed=True, heads=(2, 1, 2, 2)),
    Case(tokens=91, decay="head", packed=True, initial=False),
    Case(tokens=300, decay="head", batch=1, heads=(1, 1, 1, 1)),  # long enough for segments in time
    Case(tokens=300, decay="token", batch=1, heads=(1, 1, 1, 1)),
    Case(tokens=700, decay="fast", batch=1, heads=(1, 1, 1, 1)),  # a segment's beginning is forgotten by its end
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sweeps(case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(Case(**{**case.__dict__, "dtype": dtype}), DEVICE)
    # at -30 a token only the recurrent oracle keeps the digits of log_decay's gradient
    found = errors(x, "triton", run_oracle(x, reference.recurrent if case.decay == "fast" else None))
    check(found, dtype)


@pytest.mark.parametrize("decay", ["none", "head"])
def test_gradients_with_a_decay_that_needs_none(decay: str) -> None:
    """The sweeps for k and v share the states of segments, or have a single one."""
    for tokens in (70, 300):
        x = make_inputs(Case(tokens=tokens, decay=decay, heads=(2, 1, 2, 2), batch=1), DEVICE)
        results = []
        for method in ("torch", "triton"):
            leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
            q, k, v, state = leaves
            o, final = linear_attention(
                q, k, v, x.log_decay, initial_state=state, output_final_state=True, scale=x.scale, method=method
            )
            results.append(torch.autograd.grad((o, final), leaves, (x.do, x.dfinal)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


WIDE = [
    Case(tokens=0, key_dim=136, value_dim=136, decay="head"),
    Case(tokens=1, key_dim=256, value_dim=136, decay="none"),
    Case(tokens=70, key_dim=136, value_dim=40, decay="head", heads=(1, 2, 2, 2)),
    Case(tokens=70, key_dim=40, value_dim=200, decay="head", heads=(2, 1, 1, 2), initial=False),
    Case(tokens=96, key_dim=256, value_dim=256, decay="none", heads=(2, 2, 1, 1)),
    Case(tokens=45, key_dim=320, value_dim=512, decay="head", batch=1),  # two tiles of rows, one of them not full
    Case(tokens=300, key_dim=256, value_dim=136, decay="head", batch=1),  # in two segments
    Case(tokens=330, key_dim=136, value_dim=264, decay="none", batch=1, heads=(1, 1, 1, 1), initial=False),
]


@pytest.fixture
def wide_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many passes the form for 256 rows of the state has served]"""
    from leet_linear_attention.triton.wide_launch import Wide

    count, original = [0], Wide.run

    def counted(self: Wide, *args: Any) -> None:
        count[0] += 1
        original(self, *args)

    monkeypatch.setattr(Wide, "run", counted)
    return count


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_heads(case: Case, wide_passes: list[int]) -> None:
    """256 rows of the state in bfloat16; heads decay by 0 and by -30 a token."""
    x = make_inputs(Case(**{**case.__dict__, "dtype": torch.bfloat16}), DEVICE)
    oracle = run_oracle(x, reference.recurrent)
    found = run(lambda q, k, v, _, **more: linear_attention(q, k, v, x.log_decay, **more), x, method="triton")
    assert wide_passes[0] == 2 * (case.key_dim > 128) + 2 * (case.value_dim > 128)
    wrong = {name: error(value, oracle[name]) for name, value in found.items() if name != "dlog_decay"}
    assert max(wrong.values()) <= LIMIT[torch.bfloat16], wrong


def test_wide_heads_with_a_learned_decay(wide_passes: list[int]) -> None:
    """The passes that write or read the states of chunks are the sweep's, as are those of other dtypes."""
    case = Case(tokens=70, key_dim=136, value_dim=136, decay="head", heads=(1, 2, 2, 2), dtype=torch.bfloat16)
    x = make_inputs(case, DEVICE)
    found = errors(x, "triton", run_oracle(x))
    assert wide_passes[0] == 2
    check(found, torch.bfloat16)
    linear_attention(x.q.float(), x.k.float(), x.v.float(), x.log_decay, method="triton")
    assert wide_passes[0] == 2


def test_wide_heads_as_views() -> None:
    """q, k, v as views of one packed projection and laid out heads first; views whose loads must be narrow as well."""
    packed = torch.randn(2, 70, 2, 3 * 136, device=DEVICE).bfloat16()
    odd = torch.randn(2, 70, 2, 3 * 137, device=DEVICE).bfloat16()[..., : 3 * 136]
    first = packed.transpose(1, 2).contiguous().transpose(1, 2)
    for whole in (packed, first, odd):
        views = whole.split(136, -1)
        o, _ = linear_attention(*views, method="triton")
        wanted, _ = reference.recurrent(*(t.double() for t in views), None)
        assert error(o, wanted) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("decay", [-0.5, -0.9, -3.0, -30.0])
def test_what_a_segment_leaves_out_is_nothing(decay: float) -> None:
    """The largest numbers, just where the pass over a segment begins to read, and before."""
    x = make_inputs(Case(tokens=900, decay="head", batch=1, heads=(1, 1, 1, 1)), DEVICE)
    g = torch.full_like(x.log_decay, decay)
    v = x.v.clone()
    v[:, :420] *= 1e30
    want, _ = reference.recurrent(*(t.double() for t in (x.q, x.k, v, g)))
    o, final = linear_attention(x.q, x.k, v, g, output_final_state=True, method="triton")
    near = want[:, 700:]
    assert (o[:, 700:] - near).norm() <= 1e-5 * near.norm()
    assert final is not None and final.isfinite().all()


def test_strided_inputs() -> None:
    """q, k, v as views of one packed projection, and of tensors laid out heads first."""
    packed = torch.randn(2, 70, 2, 3, 16, device=DEVICE)
    q, k, v = packed.unbind(3)
    for views in ((q, k, v), tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))):
        o, _ = linear_attention(*views, method="triton")
        wanted, _ = linear_attention(*(t.contiguous() for t in views), method="torch")
        torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-4)


# Tokens in all, the buffer, and steps: how many tokens, how many of them taken back.
SHORT = (40, 8, [(1, 0), (3, 2), (1, 0), (8, 3), (5, 0), (1, 1), (8, 0), (2, 0), (8, 0), (1, 0), (8, 0)])
PARTS = [(17, 0), (30, 3), (1, 0), (12, 1), (40, 5), (1, 0), (20, 0), (18, 0), (2, 0), (1, 0), (1, 0)]
LONG = (134, 40, PARTS)  # of more buffered tokens than one product folds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("decay", "steps"), [("none", SHORT), ("head", SHORT), ("token", SHORT), ("none", LONG)])
def test_step_is_the_sequence(decay: str, steps: Any, dtype: torch.dtype) -> None:
    """Steps of one and several tokens, with some taken back, give what the whole sequence gives."""
    tokens, buffer, parts = steps
    case = Case(tokens=tokens, decay=decay, key_dim=24, value_dim=40, heads=(2, 1, 4, 4), dtype=dtype)
    x = make_inputs(case, DEVICE)
    state = DecodeState.allocate(2, 4, 24, 40, buffer=buffer, dtype=dtype, device=DEVICE, key_heads=1, keep=3)
    assert x.initial_state is not None
    state.load(x.initial_state)

    def part(t: torch.Tensor, at: int, n: int) -> torch.Tensor:
        return t[:, at : at + n]

    outputs, at = [], 0
    for n, taken_back in parts:
        n = min(n, tokens - at)
        g = part(x.log_decay, at, n) if decay == "token" else x.log_decay
        o = linear_attention_step(
            part(x.q, at, n), part(x.k, at, n), part(x.v, at, n), g, state, scale=x.scale, method="triton"
        )
        state.rewind(taken_back)
        outputs.append(o[:, : n - taken_back])
        at += n - taken_back
    assert at == tokens
    oracle = run_oracle(x)
    found = torch.cat(outputs, 1)
    limit = LIMIT[dtype]
    assert (found - oracle["o"]).norm() / oracle["o"].norm() <= limit
    assert (state.fold() - oracle["final_state"]).norm() / oracle["final_state"].norm() <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_gives_the_same_however_many_tiles_a_program_takes(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a row gives the same whatever else is in the batch, which decides how many that are."""
    from leet_linear_attention.triton import tuning

    x = make_inputs(Case(tokens=24, decay="token", key_dim=24, value_dim=80, dtype=dtype), DEVICE)
    found = []
    for most in (1, 2, 16):
        with monkeypatch.context() as patch:
            patch.setattr(tuning, "step_tiles", lambda form, tiles, heads, index, most=most: min(most, tiles))
            heads = x.log_decay.shape[-1]
            state = DecodeState.allocate(x.q.shape[0], heads, 24, 80, buffer=8, dtype=dtype, device=DEVICE)
            steps = [t.split(tokens, 1) for t in (x.q, x.k, x.v, x.log_decay)]
            outputs = [linear_attention_step(*part, state, method="triton") for part in zip(*steps, strict=True)]
        found.append((torch.cat(outputs, 1), state.fold()))
    for o, last in found[1:]:
        assert torch.equal(o, found[0][0]) and torch.equal(last, found[0][1])


def test_overlapping_is_for_gpus_alone() -> None:
    with overlapping(torch.device("cpu")):
        assert not _overlap.on
    assert not _overlap.on


@pytest.mark.gpu
def test_a_launch_inside_and_outside_of_overlapping() -> None:
    """One plan of a kernel serves both, in turns, and an error inside leaves nothing on."""
    options = {"buffer": 8, "dtype": torch.bfloat16, "device": torch.device("cuda")}
    state = [DecodeState.allocate(2, 2, 64, 64, **options) for _ in range(2)]
    for step in range(40):
        q, k, v = (torch.randn(2, 1, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        plain = linear_attention_step(q, k, v, None, state[0])
        with overlapping(q.device) if step % 3 else nullcontext():
            assert _overlap.on == (step % 3 > 0 and torch.cuda.get_device_capability()[0] >= 9)
            early = linear_attention_step(q, k, v, None, state[1])
        assert torch.equal(plain, early)
    with pytest.raises(ZeroDivisionError), overlapping(q.device):
        raise ZeroDivisionError
    assert not _overlap.on
