"""Modes that go on from a cache, hand one in, or change one between two forwards. Nothing is compiled here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from ..cache import RecurrentLayer
from ..upgrade import layers_counted
from ..versions import CACHE, cache_of
from .base import Answer, Expected, Mode, ModeError, Row
from .helpers import decode, equal_lengths, generate, joined
from .truth import Prompts, Truth

Order = Callable[[int], list[int]]


def continuing_modes(new: int) -> list[Mode]:
    """Modes that continue, pass or change caches, writing `new` tokens."""
    once, twice = partial(_greedy, new=new, count=1), partial(_greedy, new=new, count=2)
    return [
        Mode("chat", "chat continued from the returned cache", partial(_chat, new=new), partial(_chat_truth, new=new)),
        Mode("multi-token", "several tokens after a cache", partial(_pieces, pieces=(5, 7, 1, 2))),
        Mode("single-token", "token by token, no positions given", partial(_pieces, pieces=())),
        Mode("static-cache", "static cache", partial(_static, new=new), once),
        Mode("offloaded-cache", "offloaded cache", partial(_offloaded, new=new), once, missing=_no_accelerator),
        Mode("dynamic-cache-given", "a DynamicCache passed in", partial(_dynamic_given, new=new), twice),
        Mode("static-cache-given", "a StaticCache passed in", partial(_static_given, new=new), twice),
        Mode(
            "reset", "cache.reset(), then used again", partial(_reset, new=new), partial(_reset_truth, new=new),
            missing=_no_reset,
        ),
        _changing(
            "batch-select", "cache.batch_select_indices()", new, lambda batch: [batch - 1, 0],
            lambda cache, index: cache.batch_select_indices(index),
        ),
        _changing(
            "batch-repeat", "cache.batch_repeat_interleave()", new, lambda batch: [i // 2 for i in range(2 * batch)],
            lambda cache, index: cache.batch_repeat_interleave(2),
        ),
        _changing(
            "reorder", "cache.reorder_cache()", new, lambda batch: [1, 0, *range(1, batch - 1)],
            lambda cache, index: cache.reorder_cache(index),
        ),
    ]  # fmt: skip


def _greedy(truth: Truth, new: int, count: int) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in truth.prompts[:count]])


def _chat(model: Any, prompts: Prompts, new: int) -> Answer:
    """Two more turns after the first answer, each with the whole conversation and the cache of the turn before."""
    (row,), output = generate(model, [prompts[0]], new)
    for turn in prompts[1:3]:
        (row,), output = generate(model, [row.tokens + turn], new, cache=cache_of(output))
    return Answer([row])


def _chat_truth(truth: Truth, new: int) -> Expected:
    tokens = truth.greedy(truth.prompts[0], new)
    for turn in truth.prompts[1:3]:
        tokens = truth.greedy(tokens + turn, new)
    return Expected([tokens])


@torch.no_grad()
def _pieces(model: Any, prompts: Prompts, pieces: tuple[int, ...]) -> Answer:
    """Forwards with nothing but tokens and the cache: pieces of the given lengths, the rest token by token."""
    tokens = joined(prompts[:3])
    ids = torch.tensor([tokens], device=model.device)
    logits: list[torch.Tensor] = []
    cache, start = None, 0
    while start < len(tokens):
        length = pieces[len(logits)] if len(logits) < len(pieces) else 1
        output = model(input_ids=ids[:, start : start + length], **{CACHE: cache}, use_cache=True)
        cache, start = cache_of(output), start + length
        logits.append(output.logits[0].float().cpu())
    return Answer([Row(tokens, 0, torch.cat(logits))])


def _static(model: Any, prompts: Prompts, new: int) -> Answer:
    rows, output = generate(model, prompts[:1], new, cache_implementation="static", disable_compile=True)
    if not isinstance(cache_of(output), StaticCache):
        raise ModeError(f"asked for a static cache, generate() used {type(cache_of(output)).__name__}")
    return Answer(rows)


def _offloaded(model: Any, prompts: Prompts, new: int) -> Answer:
    rows, output = generate(model, prompts[:1], new, cache_implementation="offloaded")
    cache = cache_of(output)
    # With one softmax layer there is nothing to fetch ahead, and a patched model keeps it on the device.
    lone = sum(not isinstance(layer, RecurrentLayer) for layer in cache.layers) == 1
    if hasattr(cache, "linear_cache") or not (lone or getattr(cache, "offloading", False)):
        raise ModeError("asked for an offloaded cache, generate() used one that is not")
    return Answer(rows)


def _no_accelerator() -> str | None:
    return None if torch.accelerator.is_available() else "no accelerator to offload from"


def _dynamic_given(model: Any, prompts: Prompts, new: int) -> Answer:
    """One cache that knows the model's config, one that does not."""
    with layers_counted(model.config, len(model.base_model.layers)):
        cache = DynamicCache(config=model.config)
    first, _ = generate(model, prompts[:1], new, cache=cache)
    second, _ = generate(model, prompts[1:2], new, cache=DynamicCache())
    return Answer(first + second)


def _static_given(model: Any, prompts: Prompts, new: int) -> Answer:
    """Once to generate(), once to plain forwards."""
    cache = static_cache(model, prompts, new)
    first, _ = generate(model, prompts[:1], new, cache=cache, disable_compile=True)
    return Answer(first + decode(model, prompts[1:2], new, cache=static_cache(model, prompts, new)))


def static_cache(model: Any, prompts: Prompts, new: int) -> StaticCache:
    """A static cache with room for any of the prompts and `new` tokens."""
    with layers_counted(model.config, len(model.base_model.layers)):
        return StaticCache(config=model.config, max_cache_len=max(map(len, prompts)) + new + 3)


def _reset(model: Any, prompts: Prompts, new: int) -> Answer:
    """One cache for all prompts; a short one too, which fits into the decode buffer."""
    rows, output = generate(model, prompts[:1], new)
    for prompt in [*prompts[1:], prompts[0][:4]]:
        cache_of(output).reset()
        rows += decode(model, [prompt], new, cache=cache_of(output))
    return Answer(rows)


def _reset_truth(truth: Truth, new: int) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in [*truth.prompts, truth.prompts[0][:4]]])


def _no_reset() -> str | None:
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    layer.reset()
    return "this transformers does not reset softmax layers; 5.18 does" if layer.get_seq_length() else None


def _changing(name: str, title: str, new: int, order: Order, change: Callable[[Any, torch.Tensor], None]) -> Mode:
    """A mode that changes the rows of a cache after the prefill of a batch of equal lengths.

    order(batch): which row each row is afterwards. change(cache, order): makes it so.
    """

    def run(model: Any, prompts: Prompts) -> Answer:
        rows = order(len(prompts))
        index = torch.tensor(rows, device=model.device)
        return Answer(decode(model, equal_lengths(prompts), new, order=rows, change=lambda cache: change(cache, index)))

    def expect(truth: Truth) -> Expected:
        rows = [truth.greedy(prompt, new) for prompt in equal_lengths(truth.prompts)]
        return Expected([rows[i] for i in order(len(rows))])

    return Mode(name, title, run, expect)
