"""Runs of training, ours beside the published code: the same weights to begin with, the same batches and losses."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import corpus
import tiny
import tiny_retnet
from hosts import fla_retnet, torchscale_retnet
from leet_hf import patch_model
from leet_hf.retnet import RetNetForCausalLM
from leet_hf.retnet.convert import convert
from scripts import EXAMPLES

STEPS, BATCH, LENGTH = 50, 4, 32
LAYERS = {"num_hidden_layers": 3, "layer_types": [tiny.LINEAR, tiny.LINEAR, tiny.SOFTMAX]}
# RetNet's norm of each head makes what a row's first token gives jump where its q and k turn orthogonal: with the usual
# eps, runs from weights that differ by one rounding part by 0.01 and more, the published code's own among them.
NORM_EPS = 0.1
Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@functools.cache
def characters() -> torch.Tensor:
    """Of the text that comes along, which is ASCII."""
    text = corpus.read_sections(str(EXAMPLES / "assets" / "kjv.txt.xz"), 40_000)
    return torch.tensor(list("\n".join(text).encode()))


def batch_of(step: int, seed: int, vocabulary: int = tiny.VOCAB) -> torch.Tensor:
    """Lines of characters, int64 [BATCH, LENGTH]; folded where a model embeds fewer."""
    raw = characters()
    generator = torch.Generator().manual_seed(1000 * seed + step)
    starts = torch.randint(len(raw) - LENGTH, (BATCH,), generator=generator)
    return torch.stack([raw[start : start + LENGTH] for start in starts]) % vocabulary


def own_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def losses(model: Any, batches: list[torch.Tensor], loss_of: Loss = own_loss, *, half: bool = False) -> list[float]:
    """The loss of each step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6)
    seen = []
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.fixture(scope="module")
def batches() -> list[list[torch.Tensor]]:
    """By seed, the batches of a run."""
    return [[batch_of(step, seed) for step in range(STEPS)] for seed in range(3)]


def near(got: list[float], want: list[float]) -> None:
    assert max(abs(one - other) for one, other in zip(got, want, strict=True)) <= 1e-4
    assert statistics.mean(want[-5:]) < want[0] - 1  # something was learnt, in which the runs could have parted


def test_minimax_trains_as_stock(batches: list[list[torch.Tensor]]) -> None:
    near(losses(patch_model(tiny.model(**LAYERS)), batches[0]), losses(tiny.model(**LAYERS), batches[0]))


def test_minimax_in_bfloat16_ends_where_stock_ends(batches: list[list[torch.Tensor]]) -> None:
    """The final losses differ by less than those of runs with other seeds do."""
    ends: dict[str, list[float]] = {"stock": [], "patched": []}
    for seed, own in enumerate(batches):
        for name, model in (("stock", tiny.model(seed=seed, **LAYERS)), ("patched", tiny.model(seed=seed, **LAYERS))):
            if name == "patched":
                patch_model(model)
            run = losses(model, own[:30], half=True)
            ends[name].append(statistics.mean(run[-5:]))
            assert ends[name][-1] < run[0] - 1
    spread = max(ends["stock"]) - min(ends["stock"])
    apart = [abs(one - other) for one, other in zip(ends["stock"], ends["patched"], strict=True)]
    assert max(apart) < spread, ends


def test_retnet_trains_as_fla(batches: list[list[torch.Tensor]]) -> None:
    sizes = tiny_retnet.SIZES | {"num_hidden_layers": 2, "norm_eps": NORM_EPS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = fla_retnet.RetNetForCausalLM(fla_retnet.RetNetConfig(**sizes))
    ours = tiny_retnet.model("fla", num_hidden_layers=2, hidden_ratio=2, norm_eps=NORM_EPS)
    assert type(ours) is RetNetForCausalLM
    ours.load_state_dict(theirs.state_dict())
    near(losses(ours, batches[0]), losses(theirs, batches[0]))


def test_retnet_trains_as_torchscale(tmp_path: Path) -> None:
    options = torchscale_retnet.Options(activation_fn="swish", layernorm_eps=NORM_EPS)
    theirs = torchscale_retnet.randomized(torchscale_retnet.RetNetDecoder(options), 0)
    torch.save(theirs.state_dict(), tmp_path / "retnet.pt")
    known = {k: v for k, v in vars(options).items() if k not in ("use_lm_decay", "use_glu", "use_ffn_rms_norm")}
    (tmp_path / "options.json").write_text(json.dumps(known))
    convert(tmp_path / "retnet.pt", tmp_path / "new", config=tmp_path / "options.json")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert type(ours) is RetNetForCausalLM

    def next_token(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    run = [batch_of(step, 0, ours.config.vocab_size) for step in range(STEPS)]
    near(losses(ours, run), losses(theirs, run, next_token))
