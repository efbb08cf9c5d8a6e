"""A training step, forward + backward, of whole models with random weights: ours against the published code's.

    python benchmarks/train.py [--quick] [--only SUBSTRING] [--no-peers] [--output FOLDER]

MiniMax 1.25B (hidden 2048, 16 layers 7:1, 16 heads, 2 experts, top 1) patched against stock, and RetNet 1.35B (hidden
2048, 24 layers, 8 heads, K 256, V 512) of leet_hf against FLA's where that is installed (FLA tunes itself for minutes
at its first step), all bfloat16, in one run on the same tokens, ours first. Results are written after every row, so
that a run that is cut keeps what it measured; a run with --only leaves other cases' results as they are. Model FLOPs
count 6 for each weight a token meets, and what attention adds; their rate is given as a fraction of that of an 8192³
matmul measured in the same run. With checkpointing, the second forward is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import device_name, options, require_cuda, table, write
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from leet_hf import patch_model
from leet_hf.retnet import RetNetConfig, RetNetForCausalLM

VOCABULARY = 32000


@dataclass(frozen=True)
class Case:
    """One row: a model at batch x length, with or without gradient checkpointing; `calls` of a step are timed."""

    model: str
    batch: int
    length: int
    checkpointing: bool = False
    calls: int = 10

    def __str__(self) -> str:
        return f"{self.model} B{self.batch} T{self.length}" + (" checkpointed" if self.checkpointing else "")


CASES = [
    Case("minimax", 4, 2048),
    Case("retnet", 4, 2048),
    Case("retnet", 1, 65536, True, 3),
    Case("minimax", 1, 65536, True, 3),  # last: stock takes longest here
]
TINY = [Case("minimax", 2, 64, calls=2), Case("retnet", 2, 64, calls=2), Case("minimax", 1, 128, True, 1)]
Maker = Callable[[], Any]


def minimax(tiny: bool) -> dict[str, Maker]:
    kinds = ["linear_attention"] * 7 + ["full_attention"]
    sizes: dict[str, Any] = dict(hidden_size=2048, intermediate_size=4096, num_attention_heads=16, head_dim=128)
    if tiny:
        sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=16)
    config = MiniMaxConfig(
        vocab_size=VOCABULARY // (100 if tiny else 1), num_hidden_layers=len(kinds) * (1 if tiny else 2),
        layer_types=kinds * (1 if tiny else 2), num_key_value_heads=sizes["num_attention_heads"] // 2,
        num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=1 << 17, block_size=16 if tiny else 256,
        **sizes,
    )  # fmt: skip
    return {"ours": lambda: patch_model(MiniMaxForCausalLM(config)), "stock": lambda: MiniMaxForCausalLM(config)}


def retnet(tiny: bool) -> dict[str, Maker]:
    sizes: dict[str, Any] = dict(hidden_size=2048, num_hidden_layers=24, num_heads=8, vocab_size=VOCABULARY)
    if tiny:
        sizes = dict(hidden_size=64, num_hidden_layers=2, num_heads=4, vocab_size=VOCABULARY // 100)
    makers: dict[str, Maker] = {"ours": lambda: RetNetForCausalLM(RetNetConfig(**sizes))}
    if torch.cuda.is_available():
        try:
            from fla.models import RetNetConfig as FlaConfig
            from fla.models import RetNetForCausalLM as FlaModel
        except ImportError:
            pass
        else:
            makers["fla"] = lambda: FlaModel(FlaConfig(**sizes))
    return makers


FAMILIES = {"minimax": minimax, "retnet": retnet}


def flops(model: Any, case: Case) -> float:
    """Of forward + backward: 2 + 4 for each weight a token is multiplied with, and what attention adds."""
    config = model.config
    weights = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed" in name:
            continue
        share = config.num_experts_per_tok / config.num_local_experts if ".experts." in name else 1.0
        weights += share * parameter.numel()
    kinds = getattr(config, "layer_types", ["linear_attention"] * config.num_hidden_layers)
    heads = getattr(config, "num_attention_heads", None) or config.num_heads  # the latter is FLA's name
    if case.model == "minimax":
        key_dim = value_dim = config.head_dim
    else:
        key_dim, value_dim = config.hidden_size // heads, 2 * config.hidden_size // heads
    # A state is written and read once a token; softmax meets half the row, in two products.
    states = kinds.count("linear_attention") * heads * 2 * key_dim * value_dim
    rows = kinds.count("full_attention") * heads * key_dim * case.length
    return 6.0 * case.batch * case.length * (weights + states + rows)


def matmul_rate(size: int, device: str) -> float:
    """FLOPs a second of a square bfloat16 matmul."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (spread(lambda: a @ b, 10, device)["median"] * 1e-3)


def spread(function: Callable[[], Any], calls: int, device: str) -> dict[str, float]:
    """Milliseconds of each of `calls` calls after one more, the device waited for: median and 20 and 80 % quantiles."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(calls + 1):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append((time.perf_counter() - began) * 1e3)
    kept = sorted(times[1:])
    return {"median": statistics.median(kept), "low": kept[len(kept) // 5], "high": kept[-1 - len(kept) // 5]}


def measure(case: Case, contender: str, make: Maker, device: str, rate: float) -> dict[str, Any]:
    """One row of one contender; where memory does not suffice, or a peer refuses, that is said in its place."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"case": str(case), "who": contender}
    try:
        with torch.device(device):
            model = make().to(torch.bfloat16).train()
        row["parameters"] = sum(p.numel() for p in model.parameters())
        if case.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(model.config.vocab_size, (case.batch, case.length), device=device)

        def step() -> Any:
            for parameter in model.parameters():
                parameter.grad = None
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss

        began = time.perf_counter()
        row["loss"] = step().item()  # waits for the device
        row["first s"] = time.perf_counter() - began
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["spread"] = spread(step, case.calls, device)
        row["ms"] = row["spread"]["median"]
        row["spread %"] = 100 * (row["spread"]["high"] - row["spread"]["low"]) / row["ms"]
        row["tokens/s"] = case.batch * case.length / row["ms"] * 1e3
        row["flops"] = flops(model, case)
        row["of matmul %"] = 100 * row["flops"] / (row["ms"] * 1e-3) / rate
        if device == "cuda":
            row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    except RuntimeError as error:
        if contender == "ours" and not isinstance(error, torch.OutOfMemoryError):
            raise
        row["error"] = str(error).split(".")[0]
    return row


def rows_of(cases: list[Case], peers: bool, tiny: bool, device: str, rate: float) -> Iterator[dict[str, Any]]:
    for case in cases:
        for contender, make in FAMILIES[case.model](tiny).items():
            if contender == "fla" and (not peers or case.length > 8192):
                continue
            yield measure(case, contender, make, device, rate)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]]) -> None:
    """How many times as fast as the others ours is, in the same case."""
    for row in rows:
        ours = next((r for r in rows if r["case"] == row["case"] and r["who"] == "ours" and "ms" in r), None)
        if ours is not None and "ms" in row and row is not ours:
            row["x ours"] = row["ms"] / ours["ms"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Thousand tokens a second, a bar for each contender in each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "ms" in row]
    figure, axes = pyplot.subplots(figsize=(9, 0.45 * len(shown) + 1.4))
    colours = ["#0b62a4" if row["who"] == "ours" else "#8a8a8a" for row in shown]
    axes.barh(range(len(shown)), [row["tokens/s"] / 1e3 for row in shown], color=colours)
    axes.set_yticks(range(len(shown)), [f"{row['case']}: {row['who']}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("thousand tokens a second, forward + backward")
    axes.set_title(f"training steps in bfloat16 on {device_name()}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


COLUMNS = ["case", "who", "ms", "spread %", "x ours", "tokens/s", "peak GiB", "of matmul %", "first s", "loss", "error"]


def main() -> None:
    parser = options(__doc__, quick="the first case alone, no peers but stock")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # what tests run, on any device
    chosen = parser.parse_args()
    if not chosen.tiny:
        require_cuda()
    every = TINY if chosen.tiny else CASES
    cases = [case for case in every if chosen.only in str(case)][: 1 if chosen.quick else None]
    if not cases:
        raise SystemExit(f"--only {chosen.only!r} names no case; there are: {', '.join(map(str, every))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = matmul_rate(256 if chosen.tiny else 8192, device)
    print(f"matmul {rate / 1e12:.3g} TFLOP/s", flush=True)
    rows: list[dict[str, Any]] = []
    for row in rows_of(cases, not (chosen.quick or chosen.no_peers), chosen.tiny, device, rate):
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True)
        rows.append(row)
        compare(rows)
        record = {"matmul_flops_per_second": rate, "rows": rows}
        path = write("train", record, chosen.output, part_by="case" if chosen.only else "")
        plot(json.loads(path.read_text())["rows"], path.with_suffix(".png"))
    print(table(rows, COLUMNS))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
