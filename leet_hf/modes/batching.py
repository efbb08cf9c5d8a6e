"""Modes that put several sequences into one batch: pads on the right or inside, and sequences packed into one row."""

from __future__ import annotations

from typing import Any

import torch

from .base import Answer, Expected, Mode, Row
from .helpers import Side, decode, joined
from .truth import Prompts, Truth


def batching_modes(new: int) -> list[Mode]:
    """Padding by plain forwards, decoding `new` tokens, and packing."""
    return [
        _padding("right", "right-padded batch", new),
        _padding("middle", "padding inside the rows", new),
        Mode("packed-lengths", "packed, by cu_seq_lens_q", _packed_by_lengths),
        Mode("packed-positions", "packed, by restarting position_ids", _packed_by_positions),
    ]


def _padding(side: Side, title: str, new: int) -> Mode:
    def run(model: Any, prompts: Prompts) -> Answer:
        return Answer(decode(model, prompts, new, side=side))

    def expect(truth: Truth) -> Expected:
        return Expected([truth.greedy(prompt, new) for prompt in truth.prompts])

    return Mode(f"{side}-padding", title, run, expect)


def pack(prompts: Prompts, device: torch.device) -> dict[str, dict[str, Any]]:
    """Rows packed into one, as forward's keyword arguments: `ids`, `lengths`, `positions` and `index`, in that order
    what transformers' DataCollatorWithFlattening calls input_ids, cu_seq_lens_*, position_ids and seq_idx."""
    lengths = torch.tensor([0, *map(len, prompts)], dtype=torch.int32, device=device)
    bounds = lengths.cumsum(0, dtype=torch.int32)
    longest = max(map(len, prompts))
    index = [i for i, row in enumerate(prompts) for _ in row]
    return {
        "ids": {"input_ids": torch.tensor([joined(prompts)], device=device)},
        "lengths": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest},
        "positions": {"position_ids": torch.tensor([[i for row in prompts for i in range(len(row))]], device=device)},
        "index": {"seq_idx": torch.tensor([index], dtype=torch.int32, device=device)},
    }


@torch.no_grad()
def _packed(model: Any, prompts: Prompts, parts: tuple[str, ...], **options: Any) -> list[Row]:
    packed = pack(prompts, model.device)
    arguments = {name: value for part in ("ids", *parts) for name, value in packed[part].items()}
    logits = model(**arguments, **options).logits[0].float().cpu()
    return [Row(row, 0, own) for row, own in zip(prompts, logits.split([*map(len, prompts)]), strict=True)]


def _packed_by_lengths(model: Any, prompts: Prompts) -> Answer:
    """As the collator sends it, and by lengths alone; without a cache and with the one the model makes."""
    collated = _packed(model, prompts, ("lengths", "positions", "index"), use_cache=False)
    return Answer(collated + _packed(model, prompts, ("lengths",)))


def _packed_by_positions(model: Any, prompts: Prompts) -> Answer:
    return Answer(_packed(model, prompts, ("positions",), use_cache=False) + _packed(model, prompts, ("positions",)))
