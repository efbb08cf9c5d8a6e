"""What `leet-hf demo` measures: text and speed, bytes of cache, and every decoding mode, stock against patched."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .modes import Mode, Outcome, Truth, check, modes
from .patch import patch_model
from .versions import cache_of

MODEL = "kjv-minimax"
PROMPT = "And it came to pass in those days"
# What the modes continue: of different lengths, so that padding, packing and reordering have something to get wrong.
MODE_PROMPTS = (
    "In the beginning God created the heaven and the earth.",
    "Blessed are the meek: for they shall",
    "The LORD is my shepherd; I shall not want. He maketh me to lie down in green pastures:",
)


def shipped_model() -> Path:
    """Folder of the trained model that comes with the project: inside a wheel's package, or in a checkout's examples.

    Raises:
        FileNotFoundError: it is in neither.
    """
    package = Path(__file__).resolve().parent
    places = [package / "assets" / MODEL, package.parent / "examples" / "assets" / MODEL]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"no trained model in {' or '.join(map(str, places))}; reinstall leet-hf, or name a model with --model"
    )


@dataclass(frozen=True)
class Subject:
    """The two models a demo compares, in float32 and in eval mode, with the same weights, and their tokenizer."""

    tokenizer: Any
    stock: Any
    patched: Any

    @classmethod
    def load(cls, folder: str | Path, device: str) -> Subject:
        """Load a model with AutoModelForCausalLM and patch a copy of it."""
        stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        stock.to(device).eval()
        return cls(AutoTokenizer.from_pretrained(folder), stock, patch_model(copy.deepcopy(stock)))


@dataclass(frozen=True)
class Written:
    """One call of generate(): the new tokens, seconds to the first and new tokens per second after it."""

    tokens: list[int]
    first: float
    rate: float


class _Stream(TextStreamer):
    """Hands on words as they are written, and notes when tokens came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def write(model: Any, tokenizer: Any, prompt: str, count: int, seed: int, emit: Callable[[str], None]) -> Written:
    """Sample `count` (at least 2) tokens after `prompt` with a fixed seed; `emit` gets prompt and text word by word."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "pad_token_id": tokenizer.pad_token_id}
    # The first call of a process pays for what later ones find ready; neither side is to be charged for it.
    model.generate(**inputs, max_new_tokens=2, **options)
    stream = _Stream(tokenizer, emit)
    torch.manual_seed(seed)
    start = time.perf_counter()
    ids = model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, streamer=stream, **options)[0]
    _, first, *_, last = stream.times  # the streamer is handed the prompt, and then every token
    return Written(ids[inputs["input_ids"].shape[1] :].tolist(), first - start, (count - 1) / (last - first))


def cache_bytes(model: Any, length: int) -> int:
    """Bytes of all tensors in the cache that a forward over `length` tokens returns."""
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache, set())}.values())


def softmax_cache_bytes(model: Any, length: int) -> int:
    """Bytes of keys and values after `length` tokens if all layers of a model of this shape were softmax attention."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * length * model.dtype.itemsize


def _tensors(held: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that an object holds, directly or in what it holds."""
    if id(held) in seen or isinstance(held, (type, torch.nn.Module)):
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value, seen)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors(value, seen)
    elif hasattr(held, "__dict__"):
        yield from _tensors(vars(held), seen)


@dataclass(frozen=True)
class Verdict:
    """A decoding mode, and how each model did in it; both None where this machine can not run it, with the reason."""

    mode: Mode
    stock: Outcome | None
    patched: Outcome | None
    missing: str | None = None


def judge_modes(subject: Subject, new: int = 18) -> Iterator[Verdict]:
    """Run every decoding mode on both models, writing `new` tokens, and compare with cache-free forwards of stock."""
    truth = Truth(subject.stock, [subject.tokenizer(prompt)["input_ids"] for prompt in MODE_PROMPTS])
    for mode in modes(new=new, long=256):
        if (missing := mode.missing()) is not None:
            yield Verdict(mode, None, None, missing)
            continue
        yield Verdict(mode, check(mode, subject.stock, truth=truth), check(mode, subject.patched, truth=truth))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings: stock's are about what the tables show."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)
        transformers.logging.enable_progress_bar()
