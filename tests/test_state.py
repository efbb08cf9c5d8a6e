"""DecodeState and the step operator: after any steps, rewinds and changes of rows they equal the oracle."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor

from leet_linear_attention import DecodeState, linear_attention, linear_attention_step, reference
from operator_cases import error, targets
from state_history import B, History, K, N, V

TARGETS = pytest.mark.parametrize("target", targets())


@TARGETS
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_history(target: tuple[str, str], dtype: torch.dtype, seed: int) -> None:
    keep = [0, 0, 1, 3, 5, N][seed]
    heads = [(4, 2, 1, 4), (1, 1, 1, 1), (2, 1, 4, 2), (1, 1, 4, 4), (3, 3, 3, 3), (2, 2, 2, 1)][seed]
    h = History(target, dtype, heads, keep, seed)
    sure = 0  # tokens that can be taken back
    for _ in range(30):
        action = h.random.choice(["step", "step", "one", "append", "rewind", "reorder", "select", "repeat", "other"])
        tokens = h.random.randint(0, N)
        if action in ("step", "append"):
            getattr(h, action)(tokens)
            sure = min(sure + tokens, max(keep, tokens))
        elif action == "one":
            h.step(1)
            sure = min(sure + 1, max(keep, 1))
        elif action == "rewind":
            tokens = h.random.randint(0, h.count)
            h.rewind(tokens)
            sure = max(0, sure - tokens)
        elif action == "reorder":
            rows = h.state.base.shape[0]
            index = torch.tensor([h.random.randrange(rows) for _ in range(rows)], device=h.device)
            h.state.reorder(index)
            h.rows(lambda x, i=index: x.index_select(0, i))
        elif action == "select" and h.state.base.shape[0] > 2:
            index = torch.tensor([2, 0], device=h.device)
            h.state.select(index)
            h.rows(lambda x, i=index: x.index_select(0, i))
        elif action == "repeat" and h.state.base.shape[0] == 2:
            h.state.repeat(2)
            h.rows(lambda x: x.repeat_interleave(2, 0))
        elif action == "other":
            which = h.random.choice(["fold", "load", "reset"])
            if which == "fold":
                folded = h.state.fold()
                assert folded is h.state.base and h.count == 0
                assert error(folded, h.oracle(h.new(0)[0])[1]) <= 1e-5
            elif which == "load":
                loaded = torch.randn(h.state.base.shape, generator=h.numbers).to(h.state.base)
                h.state.load(loaded)
                h.forget(loaded)
            else:
                h.state.reset()
                h.forget(torch.zeros_like(h.state.base))
            sure = 0
        assert h.count >= sure


@TARGETS
@pytest.mark.parametrize("split", [[1] * 40, [3] * 14, [8] * 5, [5, 1, 8, 1, 1, 7, 2, 8, 8]], ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_steps_equal_one_call(target: tuple[str, str], decay: str, split: list[int]) -> None:
    device, method = target
    total = sum(split)
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, total, 2, d, generator=numbers).to(device) for d in (K, K, V))
    log_decay = {"none": None, "head": torch.tensor([-1e-3, -30.0]), "token": -torch.rand(B, total, 2)}[decay]
    log_decay = None if log_decay is None else log_decay.to(device)
    state = DecodeState.allocate(B, 2, K, V, N, torch.float32, device)
    outputs, at = [], 0
    for tokens in split:
        now = slice(at, at + tokens)
        g = log_decay[:, now] if decay == "token" else log_decay
        outputs.append(linear_attention_step(q[:, now], k[:, now], v[:, now], g, state, method=method))
        at += tokens
    o, final = linear_attention(q, k, v, log_decay, output_final_state=True, method=method)
    assert error(torch.cat(outputs, 1), o) <= 1e-5
    assert error(state.fold(), final) <= 1e-5


@TARGETS
def test_fold_rule(target: tuple[str, str]) -> None:
    """Buffer 8: tokens are folded only when they no longer fit, all that may be, and never one of the last `keep`."""
    for keep, counts in ((0, [3, 6, 3, 8, 1]), (5, [3, 6, 5, 5, 6])):
        h = History(target, torch.float32, keep=keep)
        for tokens, count in zip([3, 3, 3, 5, 1], counts, strict=True):
            h.step(tokens)
            assert h.count == count, (keep, tokens)
        h = History(target, torch.float32, keep=keep)
        for tokens, count in zip([3, 3, 3, 5, 1], counts, strict=True):
            h.append(tokens)
            assert h.count == count, (keep, tokens)


@TARGETS
def test_addresses_never_move(target: tuple[str, str]) -> None:
    h = History(target, torch.float32)
    before = [t.data_ptr() for t in vars(h.state).values() if isinstance(t, Tensor)]
    for _ in range(20):
        h.step(3)
    h.state.rewind(2)
    h.state.reorder(torch.tensor([1, 0], device=h.device))
    h.state.fold()
    h.state.load(torch.ones_like(h.state.base))
    h.state.reset()
    assert before == [t.data_ptr() for t in vars(h.state).values() if isinstance(t, Tensor)]


@TARGETS
def test_another_batch_goes_on_by_itself(target: tuple[str, str]) -> None:
    """A state that shared all its tensors is not moved by one that has changed its rows."""
    for change in (
        lambda state: state.select(torch.tensor([1], device=state.base.device)),
        lambda state: state.repeat(2),
    ):
        h = History(target, torch.float32)
        h.step(3)
        other = dataclasses.replace(h.state)
        change(other)
        other.rewind(2)
        assert h.count == 3 and int(other.cursor[1]) == 1
        h.state.reset()
        assert int(other.cursor[1]) == 1


@TARGETS
def test_copies_are_independent(target: tuple[str, str]) -> None:
    h = History(target, torch.float32)
    for _ in range(5):
        h.step(3)
    expected = h.oracle(h.new(0)[0])[1]
    copies = [h.state.clone(), copy.deepcopy(h.state), pickle.loads(pickle.dumps(h.state))]
    h.state.reset()
    for one in copies:
        assert (one.buffer, one.keep) == (N, 0)
        assert error(one.fold(), expected) <= 1e-5


@TARGETS
def test_uninitialised_memory_is_never_read(target: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return made

    h = History(target, torch.float32)
    for ring in (h.state.keys, h.state.values, h.state.log_decays):
        ring.fill_(float("nan"))  # slots that hold no token may hold anything
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    for tokens in (1, 3, 8, 2, 1, 7):
        h.step(tokens)


def test_float64_state() -> None:
    h = History(("cpu", "torch"), torch.float64)
    for tokens in (1, 3, 8, 2, 1, 7):
        h.step(tokens)
        assert error(h.state.clone().fold(), h.oracle(h.new(0)[0])[1]) < 1e-13


@TARGETS
def test_bf16_decoding_keeps_the_state(target: tuple[str, str]) -> None:
    """2048 tokens one by one in bf16: the state is that of the rounded inputs, as if it had been computed in fp32."""
    device, method = target
    numbers = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2048, 2, 16, generator=numbers).to(device, torch.bfloat16) for _ in range(3))
    log_decay = torch.tensor([-1e-3, -0.3], device=device)
    state = DecodeState.allocate(1, 2, 16, 16, dtype=torch.bfloat16, device=device)
    for t in range(2048):
        linear_attention_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], log_decay, state, method=method)
    _, final = reference.recurrent(q, k, v, log_decay, output_final_state=True)
    assert error(state.fold(), final) <= 1e-5


@TARGETS
def test_autocast_and_tf32_change_nothing(target: tuple[str, str]) -> None:
    before = torch.get_float32_matmul_precision()
    h = History(target, torch.float32)
    news = [h.new(7) for _ in range(6)]
    o, final = h.oracle(news[-1][0])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(target[0], dtype=torch.bfloat16):
            for q, k, v, log_decay in news:
                found = linear_attention_step(q, k, v, log_decay, h.state, scale=0.3, method=h.method)
            state = h.state.fold()
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(found, o) <= 1e-5
    assert error(state, final) <= 1e-5


def test_made_in_inference_mode_used_outside() -> None:
    h = History(("cpu", "torch"), torch.float32)
    with torch.inference_mode():
        h.state = DecodeState.allocate(B, 4, K, V, N, key_heads=2, value_heads=1)
        h.state.select(torch.tensor([0, 1]))
        h.state = h.state.clone()
        h.step(3)
    h.step(7)
    h.append(2)


def test_carries_no_gradient() -> None:
    h = History(("cpu", "torch"), torch.float32)
    q, k, v, log_decay = (t.requires_grad_() for t in h.new(N))
    o = linear_attention_step(q, k, v, log_decay, h.state)
    h.state.append(k, v, log_decay)
    h.state.load(torch.ones_like(h.state.base, requires_grad=True))
    assert not any(t.requires_grad for t in (o, *vars(h.state).values()) if isinstance(t, Tensor))


def test_nbytes() -> None:
    state = DecodeState.allocate(3, 4, 8, 6, buffer=5, dtype=torch.bfloat16, key_heads=2, value_heads=1)
    assert state.nbytes == 3 * 4 * 8 * 6 * 4 + 3 * 10 * 2 * 8 * 2 + 3 * 10 * 6 * 2 + 3 * 10 * 4 * 4 + 3 * 4


def test_methods_trace_into_one_graph() -> None:
    state = DecodeState.allocate(B, 2, K, V, N, torch.float32)
    plain = state.clone()
    q, k, v = torch.randn(B, 5, 2, K), torch.randn(B, 5, 2, K), torch.randn(B, 5, 2, V)
    log_decay = -torch.rand(B, 5, 2)

    def use(state: DecodeState) -> Tensor:
        o = linear_attention_step(q, k, v, log_decay, state)
        state.append(k, v, log_decay)
        state.rewind(2)
        return o + state.fold().sum()

    compiled = torch.compile(use, fullgraph=True, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(state), use(plain))
