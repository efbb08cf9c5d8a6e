"""Steps that are launched before generate() asks for them: same tokens, same caches, whenever and however a call ends.

The recorder of these tests runs such a step no sooner than someone waits for it, so that one who does not is found out.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import tiny
import tiny_retnet
from fake_graphs import OPTIONS, FakeRecorder, ids, patched, stock_tokens
from leet_hf import patch_model
from leet_hf.cache import BUFFER
from leet_hf.versions import CACHE, cache_of

pytestmark = pytest.mark.usefixtures("recorders")
RETURNED = {"return_dict_in_generate": True}


class StopAfter(StoppingCriteria):
    """Ends every row when the sequence has so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.tokens, device=input_ids.device)


def launched(recorders: list[FakeRecorder]) -> int:
    return sum(graph.launched for recorder in recorders for graph in recorder.graphs)


def without(model: Any, kind: str) -> Any:
    """A copy of the model that launches nothing ahead, and records nothing."""
    plain = make(kind)
    plain.load_state_dict(model.state_dict())
    return patch_model(plain, decode_graphs=False)


def make(kind: str) -> Any:
    return tiny_retnet.model("fla") if kind == "retnet" else patched(tiny.model(kind))


def same_cache(got: Any, expected: Any) -> None:
    assert got.get_seq_length() == expected.get_seq_length()
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        if hasattr(ours, "shape"):
            assert ours._held <= theirs._held
            torch.testing.assert_close(ours.current_state(), theirs.current_state(), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear-first", "all-linear", "retnet"])
def test_calls_that_end_anywhere_leave_the_cache_as_it_was(kind: str, recorders: list[FakeRecorder]) -> None:
    model, prompt = make(kind), ids(2)
    plain = without(model, kind)
    for new in range(3, BUFFER + 5):  # a step ahead folds the buffer in some of these
        options: dict[str, Any] = OPTIONS | RETURNED | {"max_new_tokens": 40}
        stop = {"stopping_criteria": [StopAfter(prompt.shape[1] + new)]}
        before = launched(recorders)
        got, expected = model.generate(prompt, **options, **stop), plain.generate(prompt, **options, **stop)
        assert torch.equal(got.sequences, expected.sequences) and got.sequences.shape[1] == prompt.shape[1] + new
        assert launched(recorders) - before >= new - 2  # of which the last one was for nothing
        same_cache(cache_of(got), cache_of(expected))
        same_cache(copy.deepcopy(cache_of(got)), cache_of(expected))
        more = [
            m.generate(o.sequences, **{CACHE: cache_of(o)}, **OPTIONS) for m, o in ((model, got), (plain, expected))
        ]
        assert torch.equal(*more)


def test_a_row_that_ends_before_the_others(recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids(3)
    free = stock_tokens(model, prompt)
    options = {"eos_token_id": free[0, -4].item(), "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **OPTIONS | options), stock_tokens(model, prompt, **options))
    assert launched(recorders)


def test_nothing_is_run_for_nothing_at_the_greatest_length(recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids(2)
    model.generate(prompt, **OPTIONS)
    # 11 forwards after the prompt: the first runs as it is, the second is recorded and replayed, the others are ahead.
    assert launched(recorders) == 9 and sum(recorder.replays for recorder in recorders) == 10


def test_sampling_draws_what_it_draws_without(recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids(2)
    plain, drawn = without(model, "linear-first"), []
    for each in (model, plain):
        torch.manual_seed(0)
        stop = [StopAfter(prompt.shape[1] + 9)]
        tokens = each.generate(prompt, do_sample=True, max_new_tokens=30, stopping_criteria=stop)
        drawn.append(torch.cat([tokens.flatten(), torch.randint(1000, (5,))]))
    assert torch.equal(*drawn) and launched(recorders)


@pytest.mark.parametrize("what", ["state", "copy", "crop"])
def test_who_looks_at_the_cache_between_two_tokens(what: str, recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids()
    expected = stock_tokens(model, prompt)
    cache = DynamicCache()
    seen: list[torch.Tensor] = []

    class Looks(BaseStreamer):
        """Is given each token after the criteria were asked, when the next step may be under way."""

        def put(self, value: torch.Tensor) -> None:
            layer = next((layer for layer in cache.layers if hasattr(layer, "current_state")), None)
            if layer is not None and layer.has_tokens and what == "state":
                seen.append(layer.current_state())
            if layer is not None and layer.has_tokens and what == "copy":
                seen.append(copy.deepcopy(cache).layers[cache.layers.index(layer)].current_state())

        def end(self) -> None:
            if what == "crop":
                cache.crop(-2)

    got = model.generate(prompt, **{CACHE: cache}, streamer=Looks(), **OPTIONS)
    assert torch.equal(got, expected) and launched(recorders)
    if what != "crop":
        assert len(seen) >= 11 and not any(torch.equal(*pair) for pair in itertools.pairwise(seen))
    else:
        again = model.generate(got[:, :-2], **{CACHE: cache}, **OPTIONS | {"max_new_tokens": 2})
        assert torch.equal(again, expected)


def test_a_call_that_breaks_off_leaves_the_cache_usable(recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids()
    expected, cache = stock_tokens(model, prompt), DynamicCache()

    class Breaks(BaseStreamer):
        count = 0

        def put(self, value: torch.Tensor) -> None:
            self.count += 1
            if self.count == 7:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, **{CACHE: cache}, streamer=Breaks(), **OPTIONS)
    written = cache.get_seq_length()
    assert launched(recorders) and written < expected.shape[1]
    got = model.generate(
        expected[:, : written + 1], **{CACHE: cache}, **OPTIONS | {"max_length": 23, "max_new_tokens": None}
    )
    assert torch.equal(got, expected[:, :23])


def _own_inputs(model: Any) -> dict[str, Any]:
    stock = type(model).prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: stock(model, *args, **kwargs)
    return {}


def _own_loop(model: Any) -> dict[str, Any]:
    def loop(model: Any, input_ids: torch.Tensor, stopping_criteria: Any, **kwargs: Any) -> torch.Tensor:
        cache = {name: kwargs[name] for name in ("past_key_values", "cache") if name in kwargs}
        while not stopping_criteria(input_ids, None).all():
            past = next(iter(cache.values())).get_seq_length()
            step = model(input_ids[:, past:], use_cache=True, **cache).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, step], 1)
        return input_ids

    return {"custom_generate": loop}


WAYS: dict[str, Any] = {
    "beams": lambda model: {"num_beams": 3},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "inputs prepared by another": _own_inputs,
    "a loop of the caller": _own_loop,
}


@pytest.mark.parametrize("way", WAYS)
def test_where_the_next_forward_is_not_known_nothing_is_launched(way: str, recorders: list[FakeRecorder]) -> None:
    model, prompt = make("linear-first"), ids()
    expected = stock_tokens(
        model, prompt, **{k: v for k, v in WAYS[way](make("linear-first")).items() if k != "custom_generate"}
    )
    assert torch.equal(model.generate(prompt, **OPTIONS, **WAYS[way](model)), expected)
    assert not launched(recorders)
