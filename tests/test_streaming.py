"""What stands around decoding: streamers, stopping criteria, logits processors, threads, inference mode, prefixes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TextIteratorStreamer

import tiny
import tiny_retnet
from leet_hf import patch_model
from leet_hf.cache import RecurrentLayer
from leet_hf.versions import CACHE, cache_of

OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
IDS = torch.tensor(tiny.prompts((11,)))


class Words:
    """A tokenizer for streamers: every token is its number."""

    def decode(self, tokens: Any, **kwargs: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


def stream(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    streamer = TextIteratorStreamer(Words(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=OPTIONS | options | {"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def model() -> Any:
    return patch_model(tiny.model())


@pytest.fixture(scope="module")
def want(model: Any) -> list[int]:
    return tiny.model().generate(IDS, **OPTIONS, use_cache=False)[0, 11:].tolist()


def test_streamed_tokens(model: Any, want: list[int]) -> None:
    assert stream(model, IDS) == want
    assert stream(model, IDS, prompt_lookup_num_tokens=3) == want


def test_stopping_criteria_and_logits_processors(model: Any, want: list[int]) -> None:
    def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 16)

    got = model.generate(IDS, **OPTIONS, stopping_criteria=StoppingCriteriaList([stop]))
    assert got[0, 11:].tolist() == want[:5]

    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor(want[:1]), float("-inf"))

    options = OPTIONS | {"logits_processor": LogitsProcessorList([forbid])}
    assert torch.equal(model.generate(IDS, **options), tiny.model().generate(IDS, **options, use_cache=False))


def test_threads_with_a_model_each_and_one_for_all(model: Any, want: list[int]) -> None:
    models = [patch_model(tiny.model()), tiny_retnet.model(), model, model]
    alone = [want, tiny_retnet.model().generate(IDS, **OPTIONS, use_cache=False)[0, 11:].tolist(), want, want]
    got: list[Any] = [None] * len(models)

    def work(place: int) -> None:
        got[place] = models[place].generate(IDS, **OPTIONS)[0, 11:].tolist()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == alone


def test_inference_mode_and_back(model: Any, want: list[int]) -> None:
    with torch.inference_mode():
        output = model.generate(IDS, **OPTIONS, return_dict_in_generate=True)
    assert output.sequences[0, 11:].tolist() == want
    go_on = model.generate(output.sequences.clone(), **OPTIONS, **{CACHE: cache_of(output)})
    assert torch.equal(go_on, tiny.model().generate(output.sequences, **OPTIONS, use_cache=False))


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_a_prompt_in_chunks_of_any_size(layout: str, chunk: int) -> None:
    model, prompt = patch_model(tiny.model(layout)), torch.tensor(tiny.prompts((50, 50)))
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    options = OPTIONS | {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(prompt, **options)
    pieces = model.generate(prompt, **options, prefill_chunk_size=chunk)
    assert torch.equal(pieces.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(pieces.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_leaves_a_cache_of_constant_size() -> None:
    model = patch_model(tiny.model("all-linear", num_hidden_layers=2, layer_types=[tiny.LINEAR] * 2))
    sizes = []
    for tokens in (100, 20_000):
        prompt = torch.randint(3, tiny.VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))
        output = model.generate(prompt, max_new_tokens=3, prefill_chunk_size=2048, return_dict_in_generate=True)
        assert cache_of(output).get_seq_length() == tokens + 2
        sizes.append(sum(layer.state.nbytes for layer in cache_of(output).layers))
    assert sizes[0] == sizes[1]


def test_rollback_keeps_a_window_however_long_the_prompt_and_however_many_are_taken_back() -> None:
    """Assisted decoding on a long prompt: the log holds a window, and taking tokens back moves a counter alone."""
    model, prompt = patch_model(tiny.model("all-linear")), torch.tensor(tiny.prompts((300,)))
    output = model.generate(prompt, **OPTIONS, prompt_lookup_num_tokens=4, return_dict_in_generate=True)
    layers = cache_of(output).layers
    assert {layer.state.buffer for layer in layers} == {64}
    addresses = [layer.state.base.data_ptr() for layer in layers]
    for removed in (0, 3, 20):
        before = [layer.state.base.clone() for layer in layers]
        cache_of(output).crop(-removed)
        assert all(torch.equal(kept, layer.state.base) for kept, layer in zip(before, layers, strict=True))
    assert addresses == [layer.state.base.data_ptr() for layer in layers]


def test_one_prefix_forked_into_many_continuations(model: Any) -> None:
    prefix, tails = torch.tensor(tiny.prompts((20,))), torch.tensor(tiny.prompts((4, 4, 4), seed=8))
    with torch.no_grad():
        cache = cache_of(model(prefix, use_cache=True))
    whole = torch.cat([prefix.expand(3, -1), tails], dim=1)
    want = tiny.model().generate(whole, **OPTIONS, use_cache=False)
    seen: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    try:
        for row, expected in zip(whole, want, strict=True):
            fork = copy.deepcopy(cache)
            assert torch.equal(model.generate(row[None], **OPTIONS, **{CACHE: fork})[0], expected)
    finally:
        handle.remove()
    assert max(seen) == 4, "the prefix is not computed again"
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(whole, **OPTIONS, **{CACHE: cache}), want)
    assert any(isinstance(layer, RecurrentLayer) for layer in cache.layers)
