"""Whole models: milliseconds per decoded token, prefill, first token of a process, and what drafts gain.

    python benchmarks/generate.py [--quick] [--only SUBSTRING] [--no-peers] [--output FOLDER]

Random weights, bfloat16, greedy. Per token: the time of a long generate() call less that of a short one, over the
tokens between; the recorded step alone, without transformers' loop around it, is timed too. The floor is what a token
has to read, weights and states, at the speed of a copy measured in the same run. Peers are the stock model for MiniMax
and flash-linear-attention's class for RetNet, where installed, in the same process. Parts: minimax, retnet, prefill,
first, drafts, and cpu, the only one without a GPU; `minimax-B8` is one batch. On a CPU all is in processor time of one
thread, which is what an idle machine's clock would show. A run of one part leaves results of others as they are.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import copy_bandwidth, one_thread, options, prompt, require_cuda, seconds, table, timed, write
from small import cpu, drafts
from torch.utils._pytree import tree_leaves
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from leet_hf import patch_model, patch_report
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM
from leet_hf.versions import cache_of

PROMPT, BATCHES, VOCAB = 128, (1, 8, 64), 32000
PREFILLS = ((1, 8192), (8, 2048))
LINEAR, SOFTMAX = "linear_attention", "full_attention"
ENDLESS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}


def on_gpu(make: Callable[[], Any]) -> Any:
    """A model made where it will run, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def minimax() -> Any:
    config = MiniMaxConfig(
        vocab_size=VOCAB, hidden_size=2048, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=16384, layer_types=([LINEAR] * 7 + [SOFTMAX]) * 2, **ENDLESS,
    )  # fmt: skip
    return on_gpu(lambda: MiniMaxForCausalLM(config))


def retnet(layers: int = 24) -> Any:
    config = RetNetConfig(vocab_size=VOCAB, hidden_size=2048, num_hidden_layers=layers, num_heads=8, **ENDLESS)
    return on_gpu(lambda: RetNetForCausalLM(config))


def fla_retnet() -> Any:
    """flash-linear-attention's RetNet of the same sizes, or None where it is not installed."""
    try:
        from fla.models import RetNetConfig as Config
        from fla.models import RetNetForCausalLM as Model
    except ImportError:
        return None
    config = Config(vocab_size=VOCAB, hidden_size=2048, num_hidden_layers=24, num_heads=8, **ENDLESS)
    return on_gpu(lambda: Model(config))


MAKERS = {"minimax": lambda: patch_model(minimax()), "retnet": retnet}
STOCK: dict[str, Callable[[], Any]] = {"minimax": minimax, "retnet": fla_retnet}


def per_token(model: Any, ids: torch.Tensor, many: int, rounds: int) -> dict[str, float]:
    """Milliseconds per decoded token: median, and smallest and largest, of so many differences."""
    few = 4

    def run(new: int) -> float:
        return seconds(lambda: model.generate(ids, max_new_tokens=new, do_sample=False))

    run(few), run(many)  # compiles and records what there is to
    found = sorted((run(few + many) - run(few)) / many * 1e3 for _ in range(rounds))
    return {"median": statistics.median(found), "low": found[0], "high": found[-1]}


def recorded_step(model: Any, batch: int) -> float | None:
    """Milliseconds of a replay of the recorded step of one token, which goes on from where generate() ended."""
    arenas = model._leet.decoding.arenas.values()
    steps = [step for arena in arenas for step in arena.recordings.values() if step.ids.shape == (batch, 1)]
    recorded = [step.recorded for step in steps if step.recorded is not None]
    return timed(recorded[-1].replay)["median"] if recorded else None


def read_bytes(model: Any, cache: Any, batch: int) -> tuple[float, float]:
    """(bytes of weights, bytes of states and keys) that decoding one token of each row reads."""
    weights = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if "embed" in name:
            size = batch * parameter.shape[1] * parameter.element_size()
        elif ".experts." in name:
            experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
            size *= 1 - (1 - chosen / experts) ** batch  # that some row chose it, if all are as likely
        weights += size
    return weights, float(cache_bytes(cache))


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors: of ours, of the stock model's, and of flash-linear-attention's."""
    total = 0
    for layer in cache.layers:
        state, own = getattr(layer, "state", None), [getattr(layer, "keys", None), getattr(layer, "values", None)]
        if isinstance(state, dict):
            own += tree_leaves(state)
        elif state is not None:
            total += state.nbytes
        total += sum(x.numel() * x.element_size() for x in own if isinstance(x, torch.Tensor))
    linear = getattr(cache, "linear_cache", None) or []
    return total + sum(x.numel() * x.element_size() for x in linear if isinstance(x, torch.Tensor))


def contenders(name: str, peers: bool) -> list[tuple[str, Callable[[], Any]]]:
    return [("ours", MAKERS[name]), *([("peer", STOCK[name])] if peers else [])]


def decoding(name: str, batches: list[int], peers: bool, bandwidth: float) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {batch: {"what": f"{name}-B{batch}"} for batch in batches}
    for who, make in contenders(name, peers):
        model = make()
        for batch, row in rows.items() if model is not None else ():
            many, rounds = (64, 15) if who == "ours" else (16, 5)  # a peer's token takes up to 100 ms
            row[f"{who} spread"] = per_token(model, prompt(batch, PROMPT, "cuda", VOCAB), many, rounds)
            row[f"{who} ms"] = row[f"{who} spread"]["median"]
            if who == "ours":
                row["step ms"] = recorded_step(model, batch)
            with torch.no_grad():
                cache = cache_of(model(prompt(batch, PROMPT, "cuda", VOCAB), use_cache=True))
            row[f"{who} cache MB"] = cache_bytes(cache) / 2**20
            if who == "ours":
                weights, states = read_bytes(model, cache, batch)
                row |= {"weights MB": weights / 2**20, "floor ms": (weights + states) / bandwidth * 1e3}
                row["of floor %"] = 100 * row["floor ms"] / row["ours ms"]
                row["graphs"] = next(line for line in patch_report(model).host if line.startswith("decode graphs"))
            elif "ours ms" in row:
                row["x peer"] = row["peer ms"] / row["ours ms"]
            del cache
            print(row, flush=True)
        del model
        clean()
    return [*rows.values()]


def prefill(peers: bool) -> list[dict[str, Any]]:
    rows = []
    for name in MAKERS:
        found: dict[tuple[int, int], dict[str, Any]] = {
            (batch, tokens): {"what": f"prefill {name} B{batch} T{tokens}"} for batch, tokens in PREFILLS
        }
        for who, make in contenders(name, peers):
            model = make()
            for (batch, tokens), row in found.items() if model is not None else ():
                ids = prompt(batch, tokens, "cuda", VOCAB)

                @torch.no_grad()
                def run(model: Any = model, ids: torch.Tensor = ids) -> None:
                    model(ids, use_cache=True, logits_to_keep=1)

                run()
                row[f"{who} ms"] = statistics.median(seconds(run) for _ in range(5)) * 1e3
                if who == "peer":
                    row["x peer"] = row["peer ms"] / row["ours ms"]
                print(row, flush=True)
            del model
            clean()
        rows += found.values()
    return rows


def first(name: str) -> dict[str, Any]:
    """Of a fresh process, from the call of its first generate(): seconds to the first token, and to the 32nd."""
    child = subprocess.run(
        [sys.executable, __file__, "--child", name], capture_output=True, text=True, check=True, timeout=300
    )
    return {"what": f"first {name}"} | json.loads(child.stdout.splitlines()[-1])


def child(name: str) -> None:
    model, ids = MAKERS[name](), prompt(1, PROMPT, "cuda", VOCAB)
    times: list[float] = []

    class Clock:
        def put(self, tokens: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(ids, max_new_tokens=32, do_sample=False, streamer=Clock())
    # The first that a streamer is given is the prompt. The second decoded token is the one that is recorded.
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    record = {"first token s": times[1] - begin, "slowest later token s": max(gaps), "32 tokens s": times[-1] - begin}
    record["graph MB"] = model._leet.decoding.recorder.nbytes / 2**20 if model._leet.decoding.recorder else 0.0
    print(json.dumps(record))


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


COLUMNS = ["what", "ours ms", "step ms", "peer ms", "x peer", "of least", "floor ms", "of floor %", "ours cache MB"]
COLUMNS += ["peer cache MB", "first token s", "slowest later token s", "32 tokens s", "graph MB", "tokens per forward"]
COLUMNS += ["same tokens"]


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Milliseconds per token and for prefills: ours, the peer, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = [row for row in rows if "ours ms" in row]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.6))
    for color, (shift, name) in enumerate(((-0.27, "ours ms"), (0.0, "peer ms"), (0.27, "floor ms"))):
        if not any(row.get(name) for row in rows):
            continue
        places, widths = [i + shift for i in range(len(rows))], [row.get(name) or 0 for row in rows]
        axis.barh(places, widths, 0.25, label=name, color=f"C{color}")
    axis.set_yticks(range(len(rows)), [row["what"] for row in rows])
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    axis.set_title(f"generate() on {device}")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parts(chosen: argparse.Namespace, bandwidth: float) -> Iterator[list[dict[str, Any]]]:
    """The rows of one part after another."""

    def wanted(name: str) -> bool:
        return chosen.only in name

    batches = BATCHES[:1] if chosen.quick else BATCHES
    peers = not (chosen.quick or chosen.no_peers)
    for name in MAKERS if bandwidth else ():
        own = [batch for batch in batches if wanted(f"{name}-B{batch}")]
        if own:
            yield decoding(name, own, peers, bandwidth)
    if bandwidth and wanted("prefill") and not chosen.quick:
        yield prefill(peers)
    for name in MAKERS if bandwidth else ():
        if wanted(f"first {name}"):
            yield [first(name)]
    if bandwidth and wanted("drafts") and not chosen.quick:
        yield from ([row] for row in drafts("cuda"))
    if wanted("cpu"):
        one_thread()
        yield cpu()
        yield from ([row] for row in drafts("cpu"))


def main() -> None:
    parser = options(__doc__, quick="one row a batch, no peers, no prefill, no drafts")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child)
        return
    bandwidth = 0.0
    if chosen.only != "cpu":
        require_cuda()
        bandwidth = copy_bandwidth()
        print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    name = "generate-cpu" if chosen.only == "cpu" else "generate"
    rows: list[dict[str, Any]] = []
    for more in parts(chosen, bandwidth):
        rows += more
        record: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "prompt": PROMPT, "rows": rows}
        if not bandwidth:
            record["clock"] = "processor time of one thread"
        path = write(name, record, chosen.output, part_by="what" if chosen.only else "")
    if not rows:
        raise SystemExit(f"--only {chosen.only!r} names no part")
    print(table(rows, COLUMNS))
    plot(
        json.loads(path.read_text())["rows"],
        path.with_suffix(".png"),
        torch.cuda.get_device_name() if bandwidth else "the CPU",
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
