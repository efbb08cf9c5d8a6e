"""Rounds of assisted decoding within one of transformers' loop's: the same tokens, scores and caches."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import tiny
from fake_graphs import FakeRecorder, ids, replays
from leet_hf import patch_model, rounds
from leet_hf.ahead import Ahead
from leet_hf.modes.helpers import perturbed
from leet_hf.versions import CACHE, cache_of
from test_decode_graphs_ahead import make, without

LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
RETURNED = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch, recorders: Any) -> None:
    """Steps of these tests are slow: as many rounds as there is room for."""
    monkeypatch.setattr(rounds, "LONGEST", 1e9)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return asked_for(monkeypatch)


def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of rounds found, as far as the loop then asked for these."""
    found: list[int] = []
    asked = Ahead.is_asked_for

    def counted(self: Any, *args: Any) -> bool:
        answer = asked(self, *args)
        found.extend([self.tokens] * (answer and self.running is None))
        return answer

    monkeypatch.setattr(Ahead, "is_asked_for", counted)
    return found


def repetitive(tokens: int = 7, times: int = 5) -> torch.Tensor:
    return ids(1, tokens).repeat(1, times)


def same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(got.scores), torch.cat(expected.scores), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear-first", "all-linear", "retnet"])
@pytest.mark.parametrize("draft", [False, True], ids=["lookup", "draft"])
def test_calls_that_end_anywhere(kind: str, draft: bool, ran: list[int], recorders: list[FakeRecorder]) -> None:
    model, prompt = make(kind), repetitive()
    plain, how = without(model, kind), dict(LOOKUP)
    if draft:
        how = {"assistant_model": patch_model(perturbed(plain))}
        how["assistant_model"].generation_config = GenerationConfig(
            num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
    for new in (1, 2, 5, 17, 40, 90):
        options: dict[str, Any] = RETURNED | {"max_new_tokens": new, "do_sample": False}
        ran.clear()
        got, expected = model.generate(prompt, **options, **how), plain.generate(prompt, **options)
        same(got, expected)
        # As transformers' loop leaves it: without the token that was chosen last.
        assert cache_of(got).get_seq_length() == got.sequences.shape[1] - 1
        for ours, theirs in zip(cache_of(got).layers, cache_of(expected).layers, strict=True):
            if hasattr(ours, "shape"):
                torch.testing.assert_close(ours.current_state(), theirs.current_state(), rtol=1e-3, atol=1e-4)
        more = [
            m.generate(o.sequences, **{CACHE: cache_of(o)}, max_new_tokens=7, do_sample=False)
            for m, o in ((model, got), (plain, expected))
        ]
        assert torch.equal(*more)
    assert max(ran) > 30 and sum(ran) > 80 and replays(recorders)


def test_a_token_that_ends_the_text(ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    plain = without(model, "linear-first")
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    free = plain.generate(prompt, **options)[0, prompt.shape[1] :]
    for where in (3, 4, 9, 21, 30):
        options |= RETURNED | {"eos_token_id": [free[where].item(), tiny.VOCAB - 1]}
        same(model.generate(prompt, **LOOKUP, **options), plain.generate(prompt, **options))
    assert len(ran) >= 3


def test_one_round_where_a_round_takes_long(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a second passes whenever someone looks at it
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(rounds, "LONGEST", 1.5)
    model, prompt = make("linear-first"), repetitive()
    options: dict[str, Any] = RETURNED | {"max_new_tokens": 40, "do_sample": False}
    same(model.generate(prompt, **LOOKUP, **options), without(model, "linear-first").generate(prompt, **options))
    assert len(ran) > 5 and max(ran) <= 5  # four candidates and the token behind them


class Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Doubles(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 2


OTHERS: dict[str, dict[str, Any]] = {
    "criteria": {"stopping_criteria": [Never()]},
    "processors": {"logits_processor": LogitsProcessorList([Doubles()])},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_rounds_are_not_for(other: str, ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    options: dict[str, Any] = RETURNED | {"max_new_tokens": 20, "do_sample": False} | OTHERS[other]
    same(model.generate(prompt, **LOOKUP, **options), without(model, "linear-first").generate(prompt, **options))
    assert not ran


def test_sampling_draws_what_it_draws_without(ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    drawn = []
    for each in (model, without(model, "linear-first")):
        torch.manual_seed(3)
        drawn.append(each.generate(prompt, **LOOKUP, max_new_tokens=20, do_sample=True))
    assert torch.equal(*drawn) and not ran


def test_a_loop_of_a_class_of_its_own_is_left_alone(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make("linear-first"), repetitive()
    want = without(model, "linear-first").generate(prompt, max_new_tokens=20, do_sample=False)
    inner = type(model)._assisted_decoding
    monkeypatch.setattr(type(model), "_assisted_decoding", lambda self, *a, **k: inner(self, *a, **k))
    assert torch.equal(model.generate(prompt, **LOOKUP, max_new_tokens=20, do_sample=False), want) and not ran


def test_a_forward_that_is_another_than_that_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make("linear-first"), repetitive()
    options: dict[str, Any] = RETURNED | {"max_new_tokens": 40, "do_sample": False}
    monkeypatch.setattr(Ahead, "is_asked_for", lambda *_: False)
    same(model.generate(prompt, **LOOKUP, **options), without(model, "linear-first").generate(prompt, **options))


def test_streams_get_every_token_once_and_may_break_off(ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    plain = without(model, "linear-first")
    want = plain.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    got: list[int] = []

    class Stream(BaseStreamer):
        most = 10**9

        def put(self, value: torch.Tensor) -> None:
            got.extend(value.flatten().tolist())
            if len(got) > self.most:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    stream = Stream()
    model.generate(prompt, **LOOKUP, max_new_tokens=40, do_sample=False, streamer=stream)
    assert got == want and ran
    got.clear()
    stream.most = prompt.shape[1] + 10
    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, **LOOKUP, max_new_tokens=40, do_sample=False, streamer=stream)
    again = model.generate(prompt, **LOOKUP, max_new_tokens=40, do_sample=False)
    assert again[0].tolist() == want


def test_a_prompt_with_pads(ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    mask = torch.ones_like(prompt)
    mask[:, :3] = 0
    options: dict[str, Any] = RETURNED | {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    same(model.generate(prompt, **LOOKUP, **options), without(model, "linear-first").generate(prompt, **options))
    assert not ran


@pytest.mark.parametrize("draft", [False, True], ids=["lookup", "draft"])
def test_the_right_to_recorded_steps_ends_with_the_call(draft: bool, ran: list[int]) -> None:
    """Without a collection of garbage: the next call would have to do without recorded steps until there is one."""
    model, prompt = make("linear-first"), repetitive()
    other = patch_model(perturbed(without(model, "linear-first")))
    how: dict[str, Any] = {"assistant_model": other} if draft else LOOKUP
    gc.disable()
    try:
        for _ in range(3):
            ran.clear()
            model.generate(prompt, max_new_tokens=30, do_sample=False, **how)
            assert ran
            for each in (model, other) if draft else (model,):
                assert each._leet.decoding._granted() is None
    finally:
        gc.enable()


def test_a_draft_learns_how_many_tokens_pay(ran: list[int]) -> None:
    model, prompt = make("linear-first"), repetitive()
    for more in (True, False):
        draft = make("linear-first")
        draft.load_state_dict(model.state_dict())  # it is always right
        if not more:
            draft.lm_head.weight.data = draft.lm_head.weight.data.roll(1, 0)  # it never is
        draft.generation_config = GenerationConfig(
            num_assistant_tokens=5, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.0
        )
        model.generate(prompt, max_new_tokens=60, do_sample=False, assistant_model=draft)
        learned = draft.generation_config.num_assistant_tokens
        assert (learned > 5) if more else (learned < 5)
    assert ran


def test_a_draft_writes_without_generate(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = make("linear-first"), repetitive()
    draft = patch_model(perturbed(without(model, "linear-first")))
    calls: list[int] = []
    inner = draft.generate
    draft.generate = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    for threshold in (0.0, 0.02, 1.0):  # of a draft that is about as sure as chance
        calls.clear(), ran.clear()
        draft.generation_config = GenerationConfig(num_assistant_tokens=6, assistant_confidence_threshold=threshold)
        options: dict[str, Any] = RETURNED | {"max_new_tokens": 60, "do_sample": False, "assistant_model": draft}
        got = model.generate(prompt, **options)
        del options["assistant_model"]
        same(got, without(model, "linear-first").generate(prompt, **options))
        assert len(calls) == 1 and ran
