"""From a text to batches of tokens: sections, held-out sections, a tokenizer, windows and documents, checks."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
HOLD_OUT_EVERY, FIRST_HELD_OUT = 40, 20


def read_sections(path: str, characters: int | None) -> list[str]:
    """The first `characters` of a text, in sections: parted by two empty lines, else by one, else by a line's end.

    path: a file of plain text in UTF-8, an .xz of one, or a folder of .txt, .md and .xz files, read in the order of
    their names. Raises FileNotFoundError and ValueError that say what a text must be.
    """
    raw = "\n\n\n".join(_read(file) for file in _files(Path(path)))[:characters]
    for separator in ("\n\n\n", "\n\n", "\n"):
        sections = [section.strip("\n") for section in raw.split(separator) if section.strip()]
        if len(sections) >= FIRST_HELD_OUT + 1:
            return sections
    raise ValueError(f"text {path} has {len(sections)} lines; it must have at least {FIRST_HELD_OUT + 1}")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix in (".txt", ".md", ".xz")]
    if not found:
        raise FileNotFoundError(
            f"text {path} is no file and no folder with .txt, .md or .xz files: give --text a file of plain text"
        )
    return found


def _read(file: Path) -> str:
    try:
        raw = file.read_bytes()
        return (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"text {file} can not be read ({error}): must be UTF-8, or .xz of it") from error


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


def documents(sections: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, list[int]]]:
    """Each section as {"input_ids": at most `length` of its tokens, end tokens around it}; long ones give several."""
    end = tokenizer.eos_token_id
    rows = [[end, *ids, end] for ids in tokenizer(sections, add_special_tokens=False)["input_ids"]]
    pieces = [row[start : start + length] for row in rows for start in range(0, len(row) - 1, length - 1)]
    return [{"input_ids": piece} for piece in pieces]


class CheckedCollator:
    """A collator whose batches are looked at before a model trains on them.

    Raises ValueError for labels of another shape than the tokens, tokens the model does not embed, a batch in which
    nothing is to be learnt, and, where `end` is given, documents in one row without their boundaries: the model
    would then learn to read across them.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], vocabulary: int, end: int | None = None) -> None:
        self.collate, self.vocabulary, self.end = collate, vocabulary, end

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        batch = self.collate(*arguments)
        ids, labels = batch["input_ids"], batch["labels"]
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels have shape {list(labels.shape)}, must be {list(ids.shape)} as input_ids: give one per token, "
                "not shifted, and -100 where nothing is to be learnt"
            )
        if len(ids.flatten()) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocabulary:
            raise ValueError(
                f"input_ids go from {int(ids.min())} to {int(ids.max())}, must be below {self.vocabulary}: use the "
                "tokenizer saved with the model"
            )
        if bool((labels[:, 1:] == -100).all()):
            raise ValueError("labels are -100 at every token that is predicted: the batch has nothing to learn")
        told = {"position_ids", "cu_seq_lens_q", "seq_idx"} & batch.keys()
        if self.end is not None and not told and bool(((ids[:, 1:-1] == self.end) & (labels[:, 2:] != -100)).any()):
            raise ValueError(
                "input_ids hold several documents in a row without their boundaries: give cu_seq_lens_q, seq_idx or "
                "position_ids that restart (DataCollatorWithFlattening does), or one document per row"
            )
        return batch


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, length: int, batch: int) -> float:
    """Mean negative log-likelihood in nats per token, over windows of `length` tokens that do not overlap."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, starts = 0.0, range(0, len(tokens) - 1, length)
    windows = [tokens[start : start + length + 1] for start in starts]
    full = [w for w in windows if len(w) == length + 1]
    groups = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    groups += [w[None] for w in windows if len(w) < length + 1]
    for group in groups:
        logits = model(input_ids=group[:, :-1].to(device), use_cache=False).logits
        targets = group[:, 1:].flatten().to(device)
        total += F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum").item()
    model.train(was_training)
    return total / (len(tokens) - 1)
