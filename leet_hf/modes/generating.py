"""Modes of one call of generate(): greedy, sampling, beams, and the prompt given in other forms."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .base import Answer, Expected, Mode, Row
from .helpers import generate, joined, padded, seeded
from .truth import Prompts, Truth

SEED = 20


def generating_modes(new: int) -> list[Mode]:
    """Modes that are one call of generate(), writing `new` tokens."""
    sampled: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 40}
    beams: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2}
    samples = sampled | {"num_return_sequences": 3}
    greedy = partial(_greedy, new=new)
    return [
        Mode("greedy", "greedy", partial(_each_prompt, new=new), greedy),
        _like_stock("sampling", "sampling with a seed", new, sampled),
        _like_stock("num-return-sequences", "several samples of one prompt", new, samples),
        _like_stock("beam", "beam search", new, beams),
        _like_stock("beam-sample", "beam search with sampling", new, beams | sampled),
        Mode("left-padding", "left-padded batch", partial(_left_padded, new=new), greedy),
        Mode("chunked-prefill", "prefill in chunks", partial(_chunked, new=new), partial(_chunked_truth, new=new)),
        Mode("inputs-embeds", "embeddings instead of tokens", partial(_embeds, new=new), partial(greedy, count=1)),
    ]


def _greedy(truth: Truth, new: int, count: int | None = None) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in truth.prompts[:count]])


def _each_prompt(model: Any, prompts: Prompts, new: int, **options: Any) -> Answer:
    rows: list[Row] = []
    for prompt in prompts:
        with seeded(SEED, model.device):
            rows += generate(model, [prompt], new, **options)[0]
    return Answer(rows)


def _like_stock(name: str, title: str, new: int, options: dict[str, Any]) -> Mode:
    """A mode whose truth is generate() of the stock model without a cache: same options, same seed."""

    def expect(truth: Truth) -> Expected:
        answer = _each_prompt(truth.model, truth.prompts[:2], new, use_cache=False, **options)
        return Expected([row.tokens for row in answer.rows])

    return Mode(name, title, lambda model, prompts: _each_prompt(model, prompts[:2], new, **options), expect)


def _left_padded(model: Any, prompts: Prompts, new: int) -> Answer:
    return Answer(generate(model, prompts, new)[0])


def _long_prompts(prompts: Prompts) -> Prompts:
    """Two rows of different lengths, longer than a few chunks."""
    return [joined(prompts), joined(prompts[1:])]


def _chunked(model: Any, prompts: Prompts, new: int) -> Answer:
    long, short = _long_prompts(prompts)
    rows = generate(model, [long], new, prefill_chunk_size=5)[0]
    return Answer(rows + generate(model, [long, short], new, prefill_chunk_size=7)[0])


def _chunked_truth(truth: Truth, new: int) -> Expected:
    long, short = (truth.greedy(row, new) for row in _long_prompts(truth.prompts))
    return Expected([long, long, short])


def _embeds(model: Any, prompts: Prompts, new: int) -> Answer:
    ids, _ = padded(prompts[:1], "left", model.device)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    return Answer(generate(model, prompts[:1], new, input_ids=None, inputs_embeds=embeds)[0])
