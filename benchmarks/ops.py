"""The operator, forward and forward + backward, against the memory floor and its peers in the same run.

    python benchmarks/ops.py [--quick] [--only SUBSTRING] [--no-peers] [--output FOLDER]

Peers, where installed: FLA's ``chunk_simple_gla`` (the same operator), Lightning Attention's algorithm in torch (the
same operator, ``method="lightning"``) and PyTorch's causal softmax attention (another operator, for scale). FLA tunes
itself for 40 to 120 s at its first call of a head size and direction. The floor is each input read once and each output
written once, at the speed of a copy measured in the same run. The last part, `lengths`, is time over length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    Nothing,
    copy_bandwidth,
    first_call,
    options,
    require_cuda,
    table,
    timed,
    timed_host,
    timed_or_why,
    write,
)
from methods import comparison
from methods import plot as plot_lengths

from leet_linear_attention import linear_attention


@dataclass(frozen=True)
class Shape:
    """One row: B, T, heads of q/k and of v, head dims; ``packed`` cuts T into that many sequences of random length."""

    batch: int
    tokens: int
    heads: int
    key_dim: int = 128
    value_dim: int = 128
    key_heads: int | None = None
    per_token: bool = False
    packed: int = 0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        parts = [f"B{self.batch}", f"T{self.tokens}", f"H{self.heads}"]
        if self.key_heads is not None:
            parts.append(f"kv{self.key_heads}")
        same = self.key_dim == self.value_dim
        parts.append(f"D{self.key_dim}" if same else f"K{self.key_dim} V{self.value_dim}")
        parts += ["per token"] if self.per_token else []
        parts += [f"{self.packed} packed"] if self.packed else []
        parts += ["fp16"] if self.dtype == torch.float16 else []
        return " ".join(parts)

    def bytes(self, backward: bool) -> int:
        """Inputs read and outputs written once each; forward + backward reads q, k, v twice."""
        rows = self.batch * self.tokens * 2
        kv = self.heads if self.key_heads is None else self.key_heads
        q, k, v, o = self.heads * self.key_dim, kv * self.key_dim, kv * self.value_dim, self.heads * self.value_dim
        decay = 2 * self.heads if self.per_token else 0
        forward = q + k + v + o + decay
        return rows * (forward + (q + k + v + o + q + k + v + 2 * decay if backward else 0))


SHAPES = [
    Shape(4, 8192, 32),
    Shape(1, 8192, 64),
    Shape(8, 2048, 16),
    Shape(1, 131072, 16),
    Shape(1, 1024, 32),
    Shape(2, 4096, 8, 256, 512),
    Shape(4, 8192, 32, per_token=True),
    Shape(1, 65536, 32, packed=32),
    Shape(4, 8192, 32, 64, 64),
    Shape(4, 8192, 32, 96, 96),
    Shape(2, 8192, 16, 256, 256),
    Shape(4, 8192, 32, key_heads=8),
    Shape(4, 8192, 32, dtype=torch.float16),
]


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def inputs(shape: Shape) -> dict[str, Any]:
    def normal(heads: int, width: int) -> torch.Tensor:
        x = torch.randn(shape.batch, shape.tokens, heads, width, device="cuda", dtype=shape.dtype)
        return x.requires_grad_()

    kv = shape.heads if shape.key_heads is None else shape.key_heads
    decay = (shape.batch, shape.tokens, shape.heads) if shape.per_token else (shape.heads,)
    cuts = None
    if shape.packed:
        inside = torch.randperm(shape.tokens - 1)[: shape.packed - 1].sort().values + 1
        cuts = torch.tensor([0, *inside.tolist(), shape.tokens], device="cuda", dtype=torch.int32)
    log_decay = -torch.rand(decay, device="cuda") * 0.3
    return {
        "q": normal(shape.heads, shape.key_dim),
        "k": normal(kv, shape.key_dim),
        "v": normal(kv, shape.value_dim),
        "log_decay": log_decay.requires_grad_() if shape.per_token else log_decay,
        "do": torch.randn(shape.batch, shape.tokens, shape.heads, shape.value_dim, device="cuda", dtype=shape.dtype),
        "cu_seqlens": cuts,
    }


def ours(x: dict[str, Any]) -> Callable[[], torch.Tensor]:
    return lambda: linear_attention(x["q"], x["k"], x["v"], x["log_decay"], cu_seqlens=x["cu_seqlens"])[0]


def fla(x: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    heads = x["q"].shape[2] // x["k"].shape[2]
    k, v = (t.detach().repeat_interleave(heads, 2).requires_grad_() if heads > 1 else t for t in (x["k"], x["v"]))
    decay = {"g": x["log_decay"]} if x["log_decay"].dim() == 3 else {"g_gamma": x["log_decay"]}
    return lambda: chunk_simple_gla(x["q"], k, v, scale=1.0, cu_seqlens=x["cu_seqlens"], **decay)[0]


def softmax(x: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    if x["cu_seqlens"] is not None or x["q"].shape[1] > 65536 or x["v"].shape[-1] > 128:
        return None
    q, k, v = (t.transpose(1, 2) for t in (x["q"], x["k"], x["v"]))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def lightning(x: dict[str, Any]) -> Callable[[], torch.Tensor] | None:
    if x["cu_seqlens"] is not None or x["log_decay"].dim() == 3:
        return None
    return lambda: linear_attention(x["q"], x["k"], x["v"], x["log_decay"], method="lightning")[0]


Contender = Callable[[dict[str, Any]], Callable[[], torch.Tensor] | None]
PEERS: dict[str, Contender] = {"sdpa": softmax, "lightning": lightning, "fla": fla}


def both_ways(x: dict[str, Any], run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        for name in ("q", "k", "v", "log_decay"):
            x[name].grad = None
        run().backward(x["do"])

    return step


def time_into(row: dict[str, Any], name: str, x: dict[str, Any], function: Callable[[], torch.Tensor]) -> None:
    """Milliseconds of a contender in both directions, or why it refuses one."""
    for key, direction in ((name, function), (f"{name} both", both_ways(x, function))):
        with torch.set_grad_enabled(key != name):
            found = timed_or_why(direction, name == "ours", 40)
        if isinstance(found, str):
            row[f"{key} refused"] = found
            continue
        row[f"{key} spread"], row[f"{key} ms"] = found, found["median"]
        if name == "ours":
            way = key.removeprefix(name).strip()
            floor = row[" ".join(filter(None, ("floor", way, "ms")))]
            row[" ".join(filter(None, (way, "of floor %")))] = 100 * floor / row[f"{key} ms"]


def measure(shape: Shape, bandwidth: float) -> dict[str, Any]:
    """One row of ours: milliseconds in both directions, fractions of the floor, host time and memory."""
    x = inputs(shape)
    row: dict[str, Any] = {"shape": str(shape)}
    row["floor ms"], row["floor both ms"] = (shape.bytes(way) / bandwidth * 1e3 for way in (False, True))
    run = ours(x)
    row["first call s"], row["first both s"] = first_call(run), first_call(both_ways(x, run))
    time_into(row, "ours", x, run)
    alone = both_ways(x, lambda: Nothing.apply(x["q"], x["k"], x["v"]))
    row["autograd both ms"] = timed(alone)["median"]  # no call both ways can take less on this host
    with torch.no_grad():
        row["host ms"] = timed_host(run)["median"]
    row["extra memory %"] = extra_memory(x, both_ways(x, run))
    return row


def measure_peer(row: dict[str, Any], peer: str, shape: Shape) -> None:
    """A peer's milliseconds, and how many times ours they are, into the row of its shape; ours is timed beside it."""
    x = inputs(shape)
    function = PEERS[peer](x)
    if function is None:
        return
    time_into(row, peer, x, function)
    if peer == "fla":
        time_into(row, "ours", x, ours(x))
        for key, ratio in (("", "x fla"), (" both", "both x fla")):
            if f"fla{key} ms" in row:
                row[ratio] = row[f"fla{key} ms"] / row[f"ours{key} ms"]


def extra_memory(x: dict[str, Any], step: Callable[[], None]) -> float:
    """Peak of forward + backward beyond inputs, output and gradients, in percent of those."""
    for name in ("q", "k", "v", "log_decay"):
        x[name].grad = None
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    results = sum(x[name].numel() * x[name].element_size() for name in ("q", "k", "v"))
    results += x["do"].numel() * x["do"].element_size()
    return 100 * max(0, peak - held - results) / (held + results)


COLUMNS = ["shape", "ours ms", "fla ms", "lightning ms", "sdpa ms", "x fla", "of floor %"]
COLUMNS += ["ours both ms", "fla both ms", "lightning both ms", "sdpa both ms", "both x fla", "both of floor %"]
COLUMNS += ["autograd both ms", "host ms", "extra memory %", "first call s", "first both s"]


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Fraction of the floor per shape, forward and forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.6))
    at = range(len(rows))
    axis.barh([i - 0.2 for i in at], [r["of floor %"] for r in rows], 0.38, label="forward")
    axis.barh([i + 0.2 for i in at], [r["both of floor %"] for r in rows], 0.38, label="forward + backward")
    axis.axvline(100, color="black", linewidth=1)
    axis.set_yticks(list(at), [r["shape"] for r in rows])
    axis.invert_yaxis()
    axis.set_xlabel("percent of the memory floor")
    axis.set_title(f"linear_attention on {device}")
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = options(__doc__, quick="three shapes, no peers")
    parser.add_argument("--only", default="", help="shapes whose name contains this, or: lengths")
    chosen = parser.parse_args()
    require_cuda()
    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    shapes = [s for s in SHAPES if chosen.only in str(s)]
    if chosen.only == "lengths":
        over_length(chosen)
        return
    if not shapes:
        raise SystemExit(f"--only {chosen.only!r} names no shape; there are: {', '.join(map(str, SHAPES))}")
    if chosen.quick:
        shapes = shapes[:3]
    peers = [] if chosen.quick or chosen.no_peers else list(PEERS)
    rows: list[dict[str, Any]] = []
    # Ours first, for every shape: a peer may take minutes, and what is there is written after every row.
    for name in ("ours", *peers):
        for place, shape in enumerate(shapes):
            if name == "ours":
                rows.append(measure(shape, bandwidth))
            else:
                measure_peer(rows[place], name, shape)
            shown = ", ".join(f"{k} {v:.3g}" for k, v in rows[place].items() if isinstance(v, float) and name in k)
            print(f"{shape}: {shown}", flush=True)
            record = {"copy_bytes_per_second": bandwidth, "rows": rows}
            path = write("ops", record, chosen.output, part_by="shape" if chosen.only else "")
            torch.cuda.empty_cache()
    print(table(rows, COLUMNS))
    plot(json.loads(path.read_text())["rows"], path.with_suffix(".png"), torch.cuda.get_device_name())
    print(f"wrote {path}")
    if not (chosen.only or chosen.quick):
        over_length(chosen)


@torch.no_grad()
def over_length(chosen: argparse.Namespace) -> None:
    """Forward of one head size at all lengths, as `methods.py` shows and plots its own."""
    rows: list[dict[str, Any]] = []
    for tokens in LENGTHS:
        x = inputs(Shape(1, tokens, 16))
        for name, make in {"ours": ours, **({} if chosen.no_peers else PEERS)}.items():
            function = make(x)
            found = "not installed" if function is None else timed_or_why(function, name == "ours", 20)
            row: dict[str, Any] = {"tokens": tokens, "method": name}
            row |= {"left out": found} if isinstance(found, str) else {"ms": found["median"], "spread": found}
            rows.append(row)
        record = {"shape": "B1 H16 D128 bfloat16, one decay per head, forward", "lengths": [*LENGTHS], "rows": rows}
        path = write("ops-lengths", record, chosen.output)
    record = json.loads(path.read_text())
    print(comparison(record))
    plot_lengths(record, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
