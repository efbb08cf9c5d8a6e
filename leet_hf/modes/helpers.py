"""What the modes are made of: padding, calls of generate(), greedy decoding by plain forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from ..versions import CACHE, cache_of
from .base import Row
from .truth import Prompts

Side = Literal["left", "right", "middle"]


@contextmanager
def plain_generation(model: Any, **options: Any) -> Iterator[None]:
    """Generate from `options` alone, whatever the model's own generation config asks for (an end token, say)."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(**options)
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A fixed seed inside; outside, the random state goes on as if nothing had happened."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def padded(rows: Prompts, side: Side, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as (input ids, attention mask), both int64 [B, T], with pads on one side or inside each row."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64, device=device)
    for i, row in enumerate(rows):
        pads = width - len(row)
        first = {"left": 0, "right": len(row), "middle": len(row) // 2}[side]
        real = [*range(first), *range(first + pads, width)]
        ids[i, real] = torch.tensor(row, device=device)
        mask[i, real] = 1
    return ids, mask


def generate(
    model: Any, prompts: Prompts, new: int, *,
    cache: Any = None, settings: dict[str, Any] | None = None, **options: Any,
) -> tuple[list[Row], Any]:  # fmt: skip
    """Call model.generate() on left-padded prompts. Returns one Row per returned sequence and generate()'s output.

    cache: to go on with. settings: of the generation config, where generate() takes no such argument. options: of
    generate().
    """
    ids, mask = padded(prompts, "left", model.device)
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": new, "do_sample": False} | options
    if options["input_ids"] is None:
        del options["input_ids"]
    if cache is not None:
        options[CACHE] = cache
    with plain_generation(model, **settings or {}):
        output = model.generate(return_dict_in_generate=True, output_logits=True, **options)
    return rows_of(output, prompts), output


def rows_of(output: Any, prompts: Prompts) -> list[Row]:
    """Rows of generate()'s output. Prompts are the rows it continued; several sequences per prompt are fine."""
    logits = torch.stack(output.logits).float().cpu()  # [new, rows or beams, vocab]
    beams = getattr(output, "beam_indices", None)
    per_prompt = len(output.sequences) // len(prompts)
    rows = []
    for i, sequence in enumerate(output.sequences):
        prompt = prompts[i // per_prompt]
        written = sequence[-len(logits) :].tolist()
        beam = i if beams is None else beams[i, : len(logits)].cpu()  # which row of its step each token was chosen in
        rows.append(Row(prompt + written, len(prompt) - 1, logits[torch.arange(len(logits)), beam]))
    return rows


@torch.no_grad()
def decode(
    model: Any,
    prompts: Prompts,
    new: int,
    *,
    side: Side = "left",
    cache: Any = None,
    order: list[int] | None = None,
    change: Callable[[Any], None] | None = None,
) -> list[Row]:
    """Prefill a padded batch, then `new` greedy steps of one token, all by plain forwards with masks and positions.

    cache: a cache to use, else the model makes one. change(cache): called between prefill and steps, to put the rows of
    the cache in another `order` (which row each row was).
    """
    ids, mask = padded(prompts, side, model.device)
    output = _forward(model, ids, mask, cache)
    logits = output.logits
    rows = [Row(prompt, 0, logits[i, mask[i].bool()].float().cpu()) for i, prompt in enumerate(prompts)]
    if change is not None:
        change(cache_of(output))
    if order is not None:
        rows, mask = [rows[i] for i in order], mask[torch.tensor(order, device=mask.device)]
    for _ in range(new):
        chosen = [int(row.logits[-1].argmax()) for row in rows]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        ids = torch.tensor(chosen, device=mask.device)[:, None]
        output = _forward(model, ids, mask, cache_of(output))
        logits = output.logits[:, -1:].float().cpu()
        rows = [
            Row([*row.tokens, token], 0, torch.cat([row.logits, logits[i]]))
            for i, (row, token) in enumerate(zip(rows, chosen, strict=True))
        ]
    return rows


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True)


def joined(rows: Prompts) -> list[int]:
    """All rows, one after the other, as one."""
    return [token for row in rows for token in row]


def equal_lengths(prompts: Prompts) -> Prompts:
    """Prompts cut to the length of the shortest."""
    length = min(map(len, prompts))
    return [row[:length] for row in prompts]


def perturbed(model: Any, amount: float = 0.05) -> Any:
    """A copy of a model with noisy weights: a draft that is often, but not always, right."""
    draft = copy.deepcopy(model)
    with seeded(1, model.device), torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + amount * torch.randn_like(parameter))
    return draft
