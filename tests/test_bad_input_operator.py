"""Wrong arguments of the operator: an error that names the argument, what it was, what it must be and the remedy."""

from __future__ import annotations

import re

import pytest
import torch

from leet_linear_attention import DecodeState, linear_attention, linear_attention_step
from operator_cases import targets

B, T, H, K, V = 2, 6, 2, 8, 4
TARGETS = pytest.mark.parametrize("target", targets())


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def good() -> dict:
    return {
        "q": normal(B, T, H, K),
        "k": normal(B, T, H, K),
        "v": normal(B, T, H, V),
        "log_decay": -torch.rand(B, T, H),
        "initial_state": normal(B, H, K, V),
    }


def packed(bounds: list, **more: object) -> dict:
    one = {"q": normal(1, T, H, K), "k": normal(1, T, H, K), "v": normal(1, T, H, V), "log_decay": None}
    return {**one, "initial_state": None, "cu_seqlens": torch.tensor(bounds), **more}


def with_value(value: float) -> torch.Tensor:
    log_decay = -torch.rand(B, T, H)
    log_decay[1, 3, 1] = value
    return log_decay


# change, what the message must say (all of it, in order)
WRONG = {
    "q not 4-D": ({"q": normal(B, T, K)}, ["q", "[2, 6, 8]", "[B, T, Hq, K]"]),
    "q integer": ({"q": torch.ones(B, T, H, K, dtype=torch.int64)}, ["q", "int64", "float32, bfloat16", "convert"]),
    "q complex": ({"q": torch.ones(B, T, H, K, dtype=torch.complex64)}, ["q", "complex64", "float32"]),
    "q without heads": ({"q": normal(B, T, 0, K)}, ["q", "0 heads", "at least 1"]),
    "k not 4-D": ({"k": normal(B, T, K)}, ["k", "[2, 6, 8]", "[B, T, Hk, K]"]),
    "k other batch": ({"k": normal(3, T, H, K)}, ["k", "[3, 6, 2, 8]", "B=2, T=6"]),
    "k other tokens": ({"k": normal(B, T + 1, H, K)}, ["k", "[2, 7, 2, 8]", "B=2, T=6"]),
    "k other dim": ({"k": normal(B, T, H, K + 1)}, ["k", "K=9", "K=8"]),
    "k without heads": ({"k": normal(B, T, 0, K)}, ["k", "0 heads"]),
    "v other tokens": ({"v": normal(B, 1, H, V)}, ["v", "[2, 1, 2, 4]", "B=2, T=6"]),
    "v empty dim": ({"v": normal(B, T, H, 0)}, ["v", "head dim 0", "1 to 512"]),
    "v too wide": ({"v": normal(B, T, H, 513)}, ["v", "513", "1 to 512", "split"]),
    "K too wide": ({"q": normal(B, T, H, 513), "k": normal(B, T, H, 513)}, ["q", "K=513", "1 to 512", "split"]),
    "heads first": ({"k": normal(B, H, T, K)}, ["k", "[2, 2, 6, 8]", "tokens before heads"]),
    "dtypes differ": ({"v": normal(B, T, H, V, dtype=torch.bfloat16)}, ["v", "bfloat16", "q's dtype torch.float32"]),
    "k on meta": ({"k": torch.empty(B, T, H, K, device="meta")}, ["k", "meta", "q's device cpu", "move"]),
    "heads do not divide": ({"v": normal(B, T, 3, V)}, ["q", "2 heads", "divides H=3"]),
    "decay heads": ({"log_decay": -torch.rand(B, T, 5)}, ["q", "2 heads", "divides H=5"]),
    "decay rank": ({"log_decay": -torch.rand(T, H)}, ["log_decay", "[6, 2]", "[H] or [B, T, H] = [2, 6, H]"]),
    "decay tokens": ({"log_decay": -torch.rand(B, T - 1, H)}, ["log_decay", "[2, 5, 2]", "[2, 6, H]"]),
    "decay dtype": ({"log_decay": -torch.rand(H).bfloat16()}, ["log_decay", "bfloat16", "float32", "compute it in"]),
    "decay float64": ({"log_decay": -torch.rand(H).double()}, ["log_decay", "float64", "float32"]),
    "decay on meta": ({"log_decay": torch.empty(H, device="meta")}, ["log_decay", "meta", "cpu", "move"]),
    "decay empty": ({"log_decay": torch.empty(0)}, ["log_decay", "0 heads", "None"]),
    "decay positive": ({"log_decay": with_value(0.5)}, ["log_decay", "0.5", "finite and <= 0", "natural log"]),
    "decay NaN": ({"log_decay": with_value(float("nan"))}, ["log_decay", "NaN", "finite and <= 0"]),
    "decay -inf": ({"log_decay": with_value(float("-inf"))}, ["log_decay", "-inf", "finite", "-104"]),
    "decay NaN per head": ({"log_decay": torch.tensor([0.0, float("nan")])}, ["log_decay", "NaN"]),
    "state shape": ({"initial_state": normal(B, H, V, K)}, ["initial_state", "[2, 2, 4, 8]", "[2, 2, 8, 4]"]),
    "state rank": ({"initial_state": normal(H, K, V)}, ["initial_state", "[2, 8, 4]", "[2, 2, 8, 4]"]),
    "state heads": ({"initial_state": normal(B, 1, K, V)}, ["initial_state", "[2, 1, 8, 4]", "[2, 2, 8, 4]"]),
    "state dtype": ({"initial_state": normal(B, H, K, V).bfloat16()}, ["initial_state", "bfloat16", "float32"]),
    "state on meta": ({"initial_state": torch.empty(B, H, K, V, device="meta")}, ["initial_state", "meta", "cpu"]),
    "bounds and batch": ({"cu_seqlens": torch.tensor([0, T])}, ["q", "batch size 2", "1 with cu_seqlens", "pack"]),
    "bounds rank": (packed([[0, T]]), ["cu_seqlens", "[1, 2]", "[N + 1]"]),
    "bounds too few": (packed([0]), ["cu_seqlens", "[1]", "[N + 1]"]),
    "bounds dtype": (packed([0.0, 6.0]), ["cu_seqlens", "float32", "int32 or int64"]),
    "bounds start": (packed([1, 6]), ["cu_seqlens", "starts at 1", "0"]),
    "bounds end": (packed([0, 3, 5]), ["cu_seqlens", "ends at 5", "T=6"]),
    "bounds fall": (packed([0, 4, 2, 6]), ["cu_seqlens", "from 4 to 2 at entry 2", "non-decreasing"]),
    "states of packed": (packed([0, 2, 6], initial_state=normal(1, H, K, V)), ["initial_state", "[N, H, K, V] = [2"]),
    "method": ({"method": "quick"}, ["method", "'quick'", "auto"]),
}  # fmt: skip


def assert_says(message: str, parts: list[str]) -> None:
    assert re.search(".*".join(re.escape(p) for p in parts), message, re.DOTALL), message


@pytest.mark.parametrize("name", WRONG)
def test_linear_attention_refuses(name: str) -> None:
    change, parts = WRONG[name]
    with pytest.raises(ValueError) as caught:
        linear_attention(**{**good(), **change})
    assert_says(str(caught.value), parts)


@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "initial_state", "cu_seqlens", "scale"])
def test_what_is_no_tensor(name: str) -> None:
    arguments = packed([0, 2, 6]) if name == "cu_seqlens" else good()
    with pytest.raises(TypeError, match=name):
        linear_attention(**{**arguments, name: [0.0, 1.0]})


def test_good_arguments_pass() -> None:
    linear_attention(**good())
    linear_attention(**packed([0, 0, 4, 6]))


def new_state(**more: object) -> DecodeState:
    return DecodeState.allocate(B, H, K, V, **{"buffer": 4, "dtype": torch.float32, **more})


def good_step(tokens: int = 3) -> dict:
    q, k, v = normal(B, tokens, H, K), normal(B, tokens, H, K), normal(B, tokens, H, V)
    return {"q": q, "k": k, "v": v, "log_decay": torch.tensor([-0.1, -1.0]), "state": new_state()}


WRONG_STEP = {
    "past the buffer": (good_step(5), ["T=5", "buffer of 4", "larger buffer"]),
    "k batch": ({"k": normal(1, 3, H, K)}, ["k", "[1, 3, 2, 8]", "[2, T, 2, 8]", "select"]),
    "q batch": ({"q": normal(1, 3, H, K)}, ["q", "[1, 3, 2, 8]", "[2, 3"]),
    "q tokens": ({"q": normal(B, 2, H, K)}, ["q", "[2, 2, 2, 8]", "[2, 3"]),
    "q dim": ({"q": normal(B, 3, H, K + 1)}, ["q", "9", "8"]),
    "q heads": ({"q": normal(B, 3, 4, K)}, ["q", "4 heads", "divides", "2"]),
    "k heads": ({"k": normal(B, 3, 1, K)}, ["k", "[2, 3, 1, 8]", "[2, T, 2, 8]", "allocate"]),
    "v dim": ({"v": normal(B, 3, H, V + 1)}, ["v", "[2, 3, 2, 5]", "[2, T=3, 2, 4]"]),
    "q dtype": ({"q": normal(B, 3, H, K).bfloat16()}, ["q", "bfloat16", "decode state's dtype torch.float32"]),
    "v dtype": ({"v": normal(B, 3, H, V).bfloat16()}, ["v", "bfloat16", "decode state's dtype torch.float32"]),
    "k device": ({"k": torch.empty(B, 3, H, K, device="meta")}, ["k", "meta", "decode state's device cpu"]),
    "q device": ({"q": torch.empty(B, 3, H, K, device="meta")}, ["q", "meta", "decode state's device cpu"]),
    "decay shape": ({"log_decay": -torch.rand(B, 4, H)}, ["log_decay", "[2, 4, 2]", "[2, 3, H]"]),
    "decay heads": ({"log_decay": -torch.rand(4)}, ["log_decay", "4 heads", "divides the 2 heads"]),
    "decay positive": ({"log_decay": torch.tensor([0.0, 2.0])}, ["log_decay", "2.0", "finite and <= 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STEP)
def test_step_refuses_and_changes_nothing(name: str) -> None:
    change, parts = WRONG_STEP[name]
    arguments = {**good_step(), **change, "state": new_state()}
    state = arguments["state"]
    state.append(normal(B, 2, H, K), normal(B, 2, H, V))
    before = state.clone()
    with pytest.raises(ValueError) as caught:
        linear_attention_step(**arguments)
    assert_says(str(caught.value), parts)
    for found, was in zip(vars(state).values(), vars(before).values(), strict=True):
        assert torch.equal(found, was) if isinstance(found, torch.Tensor) else found == was


def test_step_wants_a_decode_state() -> None:
    with pytest.raises(TypeError, match=r"state is a Tensor.*DecodeState.allocate"):
        linear_attention_step(**{**good_step(), "state": torch.zeros(B, H, K, V)})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"buffer": 0}, ["buffer is 0", "at least 1"]),
        ({"keep": 5}, ["keep is 5", "0 to buffer=4", "larger buffer"]),
        ({"keep": -1}, ["keep is -1", "0 to buffer=4"]),
        ({"key_heads": 3}, ["key_heads is 3", "heads=2"]),
        ({"value_heads": 0}, ["value_heads is 0", "heads=2"]),
        ({"dtype": torch.int32}, ["dtype", "int32", "float32"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_allocate_refuses(arguments: dict, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        new_state(**arguments)
    assert_says(str(caught.value), parts)


def test_state_methods_refuse() -> None:
    state = new_state()
    state.append(normal(B, 3, H, K), normal(B, 3, H, V))
    for call, parts in (
        (lambda: state.rewind(4), ["4 tokens", "holds 3", "keep"]),
        (lambda: state.rewind(-1), ["-1", "negative"]),
        (lambda: state.load(normal(B, H, V, K)), ["state", "[2, 2, 4, 8]", "[2, 2, 8, 4]", "allocate"]),
        (lambda: state.reorder(torch.tensor([0])), ["index", "[1]", "[2]", "select"]),
        (lambda: state.append(normal(B, 5, H, K), normal(B, 5, H, V)), ["T=5", "buffer of 4"]),
        (lambda: state.append(normal(B, 2, H, K), normal(B, 3, H, V)), ["v", "[2, 3, 2, 4]", "T=2"]),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert_says(str(caught.value), parts)
        assert int(state.cursor[1]) == 3


@TARGETS
def test_values_on_a_gpu_are_looked_at_only_when_asked(target, monkeypatch: pytest.MonkeyPatch) -> None:
    device, method = target
    q, k, v = (t.to(device) for t in (normal(1, T, H, K), normal(1, T, H, K), normal(1, T, H, V)))
    wrong = [
        {"log_decay": torch.tensor([0.0, 1.0], device=device)},
        {"cu_seqlens": torch.tensor([0, 5], device=device)},
    ]
    state = new_state(device=device)
    monkeypatch.setenv("LEET_CHECK_VALUES", "1")
    for more in wrong:
        with pytest.raises(ValueError, match=next(iter(more))):
            linear_attention(q, k, v, **more, method=method)
    with pytest.raises(ValueError, match="rewind"):
        state.rewind(1)
    monkeypatch.delenv("LEET_CHECK_VALUES")
    if device == "cpu":
        with pytest.raises(ValueError, match="log_decay"):
            linear_attention(q, k, v, **wrong[0], method=method)
        with pytest.raises(ValueError, match="rewind"):
            state.rewind(1)
    else:
        linear_attention(q, k, v, **wrong[0], method=method)
        state.rewind(1)
        assert int(state.cursor[1]) == 0
