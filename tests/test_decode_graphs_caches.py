"""Caches of calls with recorded steps, on the CPU: returned, given, changed, cropped, used by two models in turns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
from fake_graphs import OPTIONS, FakeRecorder, ids, patched, replays, stock_tokens
from leet_hf import patch_model
from leet_hf.cache import RecurrentLayer
from leet_hf.modes.helpers import perturbed
from leet_hf.versions import CACHE, cache_of
from test_decode_graphs_ahead import make

pytestmark = pytest.mark.usefixtures("recorders")


def test_a_cache_that_was_returned_stays_what_it_was(recorders: list[FakeRecorder]) -> None:
    """Its tensors are used for the next call: it gets copies first."""
    model = patched(tiny.model())
    options = OPTIONS | {"return_dict_in_generate": True}
    first = model.generate(ids(1), **options)
    held = copy.deepcopy(cache_of(first))
    other = model.generate(ids(1, seed=9), **options)
    for output, cache in ((first, cache_of(first)), (first, held)):
        got = model.generate(output.sequences, **OPTIONS, **{CACHE: cache})
        assert torch.equal(got, stock_tokens(model, output.sequences))
    got = model.generate(other.sequences, **OPTIONS, **{CACHE: cache_of(other)})
    assert torch.equal(got, stock_tokens(model, other.sequences))
    assert len(recorders[0].graphs) == 1 and replays(recorders) >= 50


def test_one_prefix_and_many_continuations(recorders: list[FakeRecorder]) -> None:
    """By copies of its cache, one call each, and by repeating its rows."""
    model = patched(tiny.model())
    prefix = ids(1, 20)
    with torch.no_grad():
        cache = cache_of(model(prefix, use_cache=True))
    tails = ids(3, 4, seed=8)
    whole = torch.cat([prefix.expand(3, -1), tails], dim=1)
    want = torch.cat([stock_tokens(model, row[None]) for row in whole])
    got = [model.generate(row[None], **OPTIONS, **{CACHE: copy.deepcopy(cache)}) for row in whole]
    assert torch.equal(torch.cat(got), want)
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(whole, **OPTIONS, **{CACHE: cache}), want)


def test_a_cache_given_goes_on_growing_and_can_be_changed(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    cache = DynamicCache(config=model.config)
    written = model.generate(ids(2), **OPTIONS, **{CACHE: cache})
    assert type(cache) is DynamicCache and cache.get_seq_length() == written.shape[1] - 1
    cache.batch_select_indices(torch.tensor([1]))
    again = model.generate(written[1:], **OPTIONS, **{CACHE: cache})
    assert torch.equal(again, stock_tokens(model, written[1:]))
    cache.reset()
    assert torch.equal(model.generate(ids(2), **OPTIONS, **{CACHE: cache}), written)


def test_a_cache_of_other_rows_shares_nothing_with_later_calls(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    cache = DynamicCache(config=model.config)
    written = model.generate(ids(2), **OPTIONS, **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([1]))
    model.generate(ids(2, 17, seed=9), **OPTIONS | {"max_new_tokens": 9})
    again = model.generate(written[1:], **OPTIONS, **{CACHE: cache})
    assert torch.equal(again, stock_tokens(model, written[1:]))


@pytest.mark.parametrize("between", [False, True], ids=["directly", "with other calls between"])
def test_two_models_take_turns_with_one_cache(between: bool, recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    other = copy.deepcopy(model)
    cache = DynamicCache(config=model.config)
    written = ids(1)
    for turn, who in enumerate((model, other, model, other)):
        if between:
            who.generate(ids(1, 5 + turn, seed=turn), **OPTIONS)
        want = stock_tokens(model, written)
        written = who.generate(written, **OPTIONS, **{CACHE: cache})
        assert torch.equal(written, want)
    assert len(recorders) == 2 and all(recorder.replays >= 20 for recorder in recorders)


@pytest.mark.parametrize("how", ["together", "one by one"])
def test_tokens_are_taken_back_by_the_next_step(how: str, recorders: list[FakeRecorder]) -> None:
    """In one launch for all layers; a layer that is looked at, copied or cropped otherwise is right at once."""
    model = patched(tiny.model())
    cache = DynamicCache(config=model.config)
    written = model.generate(ids(1), **OPTIONS, **{CACHE: cache})
    arena = next(iter(model._leet.decoding.arenas.values()))
    layers = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    before = arena.counts.tolist()
    cache.crop(-1)
    cache.crop(-2)
    assert arena.counts.tolist() == before and {layer.taken for layer in layers} == {3}
    copied = copy.deepcopy(cache)
    if how == "one by one":
        assert int(layers[1].state.cursor[1]) == layers[1]._held
        assert [layer.taken for layer in layers] == [3, 0] + [3] * (len(layers) - 2)
    arena.settle(cache)
    assert arena.counts.tolist() == [count - 3 for count in before] == [layer._held for layer in layers]
    want = stock_tokens(model, written[:, :-3])
    for one in (cache, copied):
        assert torch.equal(model.generate(written[:, :-3], **OPTIONS, **{CACHE: one}), want)


def test_gradients_still_flow_through_a_cache_that_generate_made(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    output = model.generate(ids(1), **OPTIONS, return_dict_in_generate=True)
    cache = cache_of(output)
    for tokens in (output.sequences[:, -1:], ids(1, 3), ids(1, 2)):
        logits = model(tokens, use_cache=True, **{CACHE: cache}).logits
    whole = torch.cat([output.sequences, ids(1, 3), ids(1, 2)], dim=1)
    torch.testing.assert_close(logits, model(whole, use_cache=False).logits[:, -2:], rtol=1e-4, atol=1e-4)
    logits.sum().backward()
    assert model.model.layers[3].self_attn.k_proj.weight.grad is not None


@pytest.mark.parametrize("kind", ["linear-first", "all-linear", "softmax-first", "retnet"])
@pytest.mark.parametrize("how", ["lookup", "draft", "itself"])
@pytest.mark.parametrize("pads", [0, 3])
def test_assisted_decoding_goes_on_from_a_cache(kind: str, how: str, pads: int, recorders: list[FakeRecorder]) -> None:
    """Transformers' loop would read what the cache holds twice. Newer versions leave out a mask without pads."""
    model = make(kind)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how != "lookup":
        options = {"assistant_model": model if how == "itself" else patch_model(perturbed(model))}

    def write(text: Tensor, **more: Any) -> Any:
        mask = torch.ones_like(text)
        mask[:, :pads] = 0
        return model.generate(text, attention_mask=mask, return_dict_in_generate=True, **OPTIONS, **more)

    first = write(ids().repeat(1, 2))
    longer = torch.cat([first.sequences, ids(1, 5, seed=9)], dim=1)
    got = write(longer, **{CACHE: cache_of(first)}, **options)
    assert torch.equal(got.sequences, write(longer).sequences)
    assert cache_of(got) is cache_of(first) and cache_of(got).get_seq_length() == got.sequences.shape[1] - 1
