"""From a text to batches of tokens: sections, held-out sections, a tokenizer, windows."""

from __future__ import annotations

import lzma
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
HOLD_OUT_EVERY, FIRST_HELD_OUT = 40, 20


def read_sections(path: str, characters: int | None) -> list[str]:
    """The first `characters` of a text, in sections: parted by two empty lines, else by one, else by a line's end."""
    raw = lzma.decompress(Path(path).read_bytes()).decode() if path.endswith(".xz") else Path(path).read_text()
    raw = raw[:characters]
    for separator in ("\n\n\n", "\n\n", "\n"):
        sections = [section.strip("\n") for section in raw.split(separator) if section.strip()]
        if len(sections) >= FIRST_HELD_OUT + 1:
            return sections
    raise ValueError(f"text {path} has {len(sections)} lines; it must have at least {FIRST_HELD_OUT + 1}")


def train_tokenizer(sections: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` entries, learnt from `sections`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sections, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode(sections: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All sections in one row, int64 [tokens], an end token before the first and after each."""
    end = tokenizer.eos_token_id
    ids = tokenizer(sections, add_special_tokens=False)["input_ids"]
    return torch.tensor([end, *(token for section in ids for token in (*section, end))])


def split_sections(sections: list[str]) -> tuple[list[str], list[str]]:
    """Sections to train on, and every 40th, spread over the whole text, to measure with."""
    held = sections[FIRST_HELD_OUT::HOLD_OUT_EVERY]
    return [s for i, s in enumerate(sections) if i % HOLD_OUT_EVERY != FIRST_HELD_OUT], held


def batches(tokens: Tensor, length: int, batch: int, seed: int) -> list[Tensor]:
    """The batches of one epoch, int64 [batch, length]: windows from a random offset, in random order.

    Their number does not depend on the seed. There are none if the tokens do not fill one.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(length, (1,), generator=generator))
    count = max(0, len(tokens) // length - 1)
    windows = tokens[offset : offset + count * length].view(count, length)
    order = torch.randperm(count, generator=generator)[: count // batch * batch]
    return list(windows[order].split(batch)) if len(order) else []
