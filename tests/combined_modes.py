"""Modes that use several features at once, where each alone is one of `leet_hf.modes`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from packaging.version import Version

from leet_hf.modes import Answer, Expected, Mode, Row, Truth, modes
from leet_hf.modes.assisting import DRAFTING
from leet_hf.modes.batching import pack
from leet_hf.modes.continuing import static_cache
from leet_hf.modes.helpers import decode, generate, perturbed
from leet_hf.versions import CACHE, cache_of

CHUNKS_FROM_A_CACHE = Version(transformers.__version__) >= Version("5.21")
RESETS = next(mode for mode in modes() if mode.name == "reset")


def _expect_greedy(truth: Truth, new: int) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in truth.prompts])


def _long(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(generate(model, prompts, 100)[0])


def _static_batch(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(generate(model, prompts, 24, cache_implementation="static")[0])


def _static_middle(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(decode(model, prompts, 24, side="middle", cache=static_cache(model, prompts, 24)))


def _static_reset(model: Any, prompts: list[list[int]]) -> Answer:
    """One static cache for all prompts, which is emptied in place; a short prompt fits into the decode buffer."""
    cache, rows = static_cache(model, prompts, 24), []
    for prompt in prompts:
        rows += decode(model, [prompt], 24, cache=cache)
        cache.reset()
    return Answer(rows)


def _one_token_prompt(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer([generate(model, [prompt[:1]], 24)[0][0] for prompt in prompts])


def _expect_from_one_token(truth: Truth) -> Expected:
    return Expected([truth.greedy(prompt[:1], 24) for prompt in truth.prompts])


def _beams_of_a_batch(model: Any, prompts: list[list[int]], **options: Any) -> Answer:
    return Answer(generate(model, prompts, 24, num_beams=3, **options)[0])


def _expect_beams(truth: Truth) -> Expected:
    rows = [generate(truth.model, [p], 24, num_beams=3, use_cache=False)[0][0].tokens for p in truth.prompts]
    return Expected(rows)


def _second_turn(model: Any, prompts: list[list[int]], **options: Any) -> Answer:
    """A batch of conversations with pads inside: the second turns have different lengths too."""
    rows, output = generate(model, prompts, 12)
    ids, width = output.sequences, max(map(len, prompts))
    turns = list(reversed(prompts))
    mask = torch.stack([torch.tensor([0] * (width - len(p)) + [1] * (len(p) + 12)) for p in prompts])
    pads = torch.stack([torch.tensor([0] * (width - len(turn)) + [1] * len(turn)) for turn in turns])
    new = torch.stack([torch.tensor([0] * (width - len(turn)) + turn) for turn in turns])
    inputs = {"input_ids": torch.cat([ids, new], 1), "attention_mask": torch.cat([mask, pads], 1)}
    inputs[CACHE] = cache_of(output)
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    logits = torch.stack(output.logits, 1)
    return Answer([
        Row(row.tokens + turn + output.sequences[i, -12:].tolist(), len(row.tokens + turn) - 1, logits[i])
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True))
    ])  # fmt: skip


def _expect_second_turn(truth: Truth) -> Expected:
    turns = zip(truth.prompts, reversed(truth.prompts), strict=True)
    return Expected([truth.greedy(truth.greedy(prompt, 12) + turn, 12) for prompt, turn in turns])


def _after_assisted(model: Any, prompts: list[list[int]]) -> Answer:
    """Plain decoding goes on with the cache of assisted decoding. (The other way round transformers gets wrong itself:
    assisted decoding feeds a cache the tokens it already holds, softmax models too.)"""
    draft = perturbed(model)
    draft.generation_config.update(**DRAFTING)
    (row,), output = generate(model, prompts[:1], 12, assistant_model=draft)
    for turn in prompts[1:]:
        (row,), output = generate(model, [row.tokens + turn], 12, cache=cache_of(output))
    return Answer([row])


def _expect_turns(truth: Truth) -> Expected:
    tokens: list[int] = []
    for prompt in truth.prompts:
        tokens = truth.greedy(tokens + prompt, 12)
    return Expected([tokens])


def _packed_by_index(model: Any, prompts: list[list[int]]) -> Answer:
    parts = pack(prompts, model.device)
    logits = model(**parts["ids"], **parts["positions"], **parts["index"]).logits[0].detach()
    return Answer([Row(row, 0, own) for row, own in zip(prompts, logits.split([*map(len, prompts)]), strict=True)])


def decode_after_packing(model: Any, prompts: list[list[int]]) -> Answer:
    """The cache of a packed forward goes on with its last sequence; no softmax layer here remembers the others."""
    parts = pack(prompts, model.device)
    with torch.inference_mode():
        output = model(**parts["ids"], **parts["lengths"], **parts["positions"], use_cache=True)
        tokens, logits = list(prompts[-1]), [output.logits[0, -len(prompts[-1]) :]]
        for _ in range(20):
            tokens.append(int(logits[-1][-1].argmax()))
            step = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[len(tokens) - 1]])}
            output = model(**step, **{CACHE: cache_of(output)}, use_cache=True)
            logits.append(output.logits[0])
    return Answer([Row(tokens, 0, torch.cat(logits).float())])


COMBINED = [
    Mode("long-batch", "", _long, lambda truth: _expect_greedy(truth, 100)),
    Mode("static-left-padding", "", _static_batch, lambda truth: _expect_greedy(truth, 24)),
    Mode("static-middle-padding", "", _static_middle, lambda truth: _expect_greedy(truth, 24)),
    Mode("static-reset", "", _static_reset, lambda truth: _expect_greedy(truth, 24), missing=RESETS.missing),
    Mode("one-token-prompt", "", _one_token_prompt, _expect_from_one_token),
    Mode("beams-left-padding", "", _beams_of_a_batch, _expect_beams),
    Mode("beams-static", "", functools.partial(_beams_of_a_batch, cache_implementation="static"), _expect_beams),
    Mode("chat-padded-batch", "", _second_turn, _expect_second_turn),
    Mode(
        "chat-padded-batch-in-chunks", "", functools.partial(_second_turn, prefill_chunk_size=7), _expect_second_turn,
        missing=lambda: None if CHUNKS_FROM_A_CACHE else "transformers chunks from a cache since 5.21",
    ),
    Mode("chat-after-assisted", "", _after_assisted, _expect_turns),
    Mode("packed-by-seq-idx", "", _packed_by_index),
]  # fmt: skip
