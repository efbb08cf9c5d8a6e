"""The repository's small trained model, for `generate.py`: what drafts gain, and decoding on a CPU beside stock."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import prompt, seconds, spread
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from leet_hf import patch_model, patch_report
from leet_hf.versions import CACHE, cache_of

KJV = Path(__file__).parent.parent / "examples" / "assets" / "kjv-minimax"
REPETITIVE = (
    "And the sons of Reuben; Hanoch, and Phallu, Hezron, and Carmi.\n"
    "And the sons of Simeon; Jemuel, and Jamin, and Ohad.\n"
)
CPU_ROUNDS = 11
NEW = {"cpu": 96, "cuda": 192}  # tokens that are written
DEEPER = 15  # times as many layers again, in the model that has a draft


def small_model() -> tuple[Any, Any]:
    """The repository's small trained model, stock and in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(KJV, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model, AutoTokenizer.from_pretrained(KJV)


@torch.no_grad()
def deepened(model: Any, times: int) -> Any:
    """A model that writes what another does, with `times` as many layers again behind its own, which add nothing.

    MiniMax norms the residual at the beginning of every layer, so one whose projections out are 0 only scales it.
    """
    config = copy.deepcopy(model.config)
    config.layer_types = config.layer_types * (times + 1)
    config.num_hidden_layers = len(config.layer_types)
    deep = type(model)(config).to(model.device, model.dtype).eval()
    deep.generation_config = copy.deepcopy(model.generation_config)
    own, layers = copy.deepcopy(model.model), deep.model.layers
    for layer in layers[len(own.layers) :]:
        out = getattr(layer.self_attn, "out_proj", None) or layer.self_attn.o_proj
        out.weight.zero_()
        layer.mlp.experts.down_proj.zero_()
    own.layers = nn.ModuleList([*own.layers, *layers[len(own.layers) :]])
    for module in own.modules():
        if hasattr(module, "config"):
            module.config = config
    deep.model = own
    deep.tie_weights()
    return deep


def drafts(device: str) -> Iterator[dict[str, Any]]:
    """The small trained model on a text that repeats itself: plain decoding and prompt lookup, the same tokens.

    On a GPU also in bfloat16, and as the draft of a deeper model that writes the same, beside that model without it.
    "tokens per forward" counts calls of the model's head, of which transformers' loop makes one more for what rounds of
    drafts have found. "same tokens": as plain decoding of the same model writes; in bfloat16 steps of several tokens
    round otherwise.
    """
    small, tokenizer = small_model()
    small = small.to(device)
    deep = patch_model(deepened(small, DEEPER)) if device == "cuda" else None
    model = patch_model(small)
    ids = tokenizer(REPETITIVE * 4, return_tensors="pt").input_ids.to(device)
    lookup = {"prompt_lookup_num_tokens": 7}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {"plain": (model, {}), "prompt lookup": (model, lookup)}
    if deep is not None:
        ways |= {"deeper, plain": (deep, {}), "deeper, prompt lookup": (deep, lookup)}
        ways |= {"deeper, with a draft": (deep, {"assistant_model": model})}
    yield from _drafted(ways, ids, device, device)
    if deep is not None:
        model.bfloat16(), deep.bfloat16()  # patched before: decays stay as exact as they are
        yield from _drafted(ways, ids, device, f"{device} bfloat16")


def _drafted(
    ways: dict[str, tuple[Any, dict[str, Any]]], ids: torch.Tensor, device: str, where: str
) -> Iterator[dict[str, Any]]:
    """A row for every way of decoding: a model, and arguments of its generate(). A model's plain way comes first.

    Milliseconds are of the tokens between a short call and a long one.
    """
    clock = time.thread_time if device == "cpu" else time.perf_counter
    plain: dict[int, torch.Tensor] = {}
    few, many = 4, 4 + NEW[device]
    for name, (writer, arguments) in ways.items():
        forwards: list[int] = []

        def run(new: int, writer: Any = writer, arguments: dict[str, Any] = arguments) -> Any:
            return writer.generate(ids, max_new_tokens=new, do_sample=False, **arguments)

        for new in (few, many, many):
            run(new)  # compiles and records what there is to
        handle = writer.lm_head.register_forward_hook(lambda *_, seen=forwards: seen.append(1))  # not recorded
        written = run(many)
        handle.remove()
        found = spread(
            [
                (seconds(lambda: run(many), clock) - seconds(lambda: run(few), clock)) * 1e3 / NEW[device]
                for _ in range(5)
            ]
        )
        same = bool(torch.equal(written, plain.setdefault(id(writer), written)))
        row = {"what": f"drafts {name}, {where}", "ours ms": found["median"], "ours spread": found}
        row |= {"tokens per forward": many / len(forwards), "same tokens": same}
        if device == "cuda":
            row["graphs"] = next(line for line in patch_report(writer).host if line.startswith("decode graphs"))
        print(row, flush=True)
        yield row


def cpu() -> list[dict[str, Any]]:
    """The repository's small trained model on the CPU: decoding, and texts that go on from a cache."""
    tokenizer = small_model()[1]
    models = {"ours": patch_model(small_model()[0]), "peer": small_model()[0]}
    ids = tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt").input_ids
    few, many = 4, 64

    def decode(model: Any) -> float:
        """Seconds a token, over those between a short call and a long one."""
        times = [
            seconds(lambda new=new: model.generate(ids, max_new_tokens=new, do_sample=False), time.thread_time)
            for new in (few, few + many)
        ]
        return (times[1] - times[0]) / many

    @torch.no_grad()
    def go_on(model: Any, tokens: int) -> float:
        more = prompt(1, tokens, "cpu", model.config.vocab_size)
        cache = cache_of(model(ids, use_cache=True))
        return seconds(lambda: model(more, use_cache=True, **{CACHE: cache}), time.thread_time)

    calls: dict[str, Callable[[Any], float]] = {"cpu decode": decode}
    calls |= {f"cpu {tokens} tokens after a cache": functools.partial(go_on, tokens=tokens) for tokens in (64, 512)}
    rows: list[dict[str, Any]] = []
    for what, call in calls.items():
        samples: dict[str, list[float]] = {who: [] for who in models}
        for place in range(CPU_ROUNDS + 1):  # in turns, as the machine may have other work; the first is not counted
            for who, model in models.items():
                milliseconds = call(model) * 1e3
                samples[who] += [milliseconds] if place else []
        found = {who: spread(values) for who, values in samples.items()}
        row: dict[str, Any] = {"what": what} | {f"{who} ms": found[who]["median"] for who in models}
        row["x peer"] = row["peer ms"] / row["ours ms"]
        row["of least"] = found["peer"]["least"] / found["ours"]["least"]
        rows.append(row | {f"{who} spread": found[who] for who in models})
        print(rows[-1], flush=True)
    return rows
