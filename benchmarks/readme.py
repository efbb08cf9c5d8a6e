"""Put the results that are there into README's tables, and plots beside them: nothing is timed.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: benchmarks/readme.py -->", "<!-- end -->"


def ops(record: dict[str, Any]) -> str:
    """Whole calls of the operator: ours, peers of the same run, fractions of the floor."""
    columns = ["shape", "ours ms", "fla ms", "x fla", "of floor %", "ours both ms", "fla both ms", "both x fla"]
    rows = record["rows"]
    return table(rows, [*columns, "both of floor %"])


def blocks(record: dict[str, Any]) -> str:
    """The best block shape of every pass over time."""
    best: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        if "ms" in row and row["ms"] < best.get(row["pass"], {"ms": float("inf")})["ms"]:
            best[row["pass"]] = row
    return table([*best.values()], ["pass", "ms", "of floor %"])


def step(record: dict[str, Any]) -> str:
    """The decode step, of one token and of four."""
    columns = ["shape", "T1 us", "fla us", "x fla", "read state us", "of state read %", "T4 us", "T4 / T1"]
    return table(record["rows"], columns)


def generate(record: dict[str, Any]) -> str:
    """Whole models, a decoded token."""
    columns = ["what", "ours ms", "step ms", "peer ms", "x peer", "floor ms", "of floor %", "ours cache MB"]
    rows = [row for row in record["rows"] if "floor ms" in row]
    return table(rows, columns)


def drafts(record: dict[str, Any]) -> str:
    """Plain decoding and drafts, a decoded token."""
    rows = [row for row in record["rows"] if row["what"].startswith("drafts")]
    return table(rows, ["what", "ours ms", "tokens per forward", "same tokens"]) if rows else ""


def prompts(record: dict[str, Any]) -> str:
    """Whole models, the prompt."""
    rows = [row for row in record["rows"] if row["what"].startswith("prefill")]
    return table(rows, ["what", "ours ms", "peer ms", "x peer"]) if rows else ""


def train(record: dict[str, Any]) -> str:
    """Whole models, forward + backward."""
    columns = ["case", "who", "ms", "x ours", "tokens/s", "peak GiB", "of matmul %"]
    return table(record["rows"], columns)


def fused(record: dict[str, Any]) -> str:
    """What surrounds the operator."""
    columns = ["kernel", "shape", "us", "torch us", "x torch", "both us", "both x torch"]
    return table(record["rows"], columns)


# Plots beside the tables of a file: (plot, what it shows)
PLOTS = {
    "ops": ("ops-lengths", "Milliseconds over length, forward: ours, FLA, Lightning Attention's algorithm and softmax"),
    "generate": ("generate", "Milliseconds a decoded token and of a prompt: ours, peers and the floor"),
    "h200/generate": ("h200/generate", "Milliseconds a decoded token, plain and with drafts, on an H200"),
    "train": ("train", "Tokens a second in training: ours and peers"),
}
# (file, title, how); in h200/ is what a card of that kind took: another one's results in a file would be overwritten
TABLES: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    ("ops", "The operator, forward and forward + backward", ops),
    ("blocks", "One pass over time (the forward is one, the backward three)", blocks),
    ("step", "The decode step in a CUDA graph, averaged over whole buffer cycles", step),
    ("generate", "Whole models with random weights, greedy, per decoded token", generate),
    ("generate", "The same models, a prompt", prompts),
    ("train", "The same models, forward + backward", train),
    ("fused", "What surrounds the operator, alone and with its gradients", fused),
    ("h200/ops", "The operator on an H200", ops),
    ("h200/step", "The decode step on an H200", step),
    (
        "h200/generate",
        "A small trained model, and one 16 times as deep that writes the same, per decoded token",
        drafts,
    ),
    ("h200/fused", "Linear layers of a recorded step", fused),
]


def readme(results: Path = RESULTS) -> str:
    """README.md with the tables of the results in place of those it holds."""
    parts, plots = [], dict(PLOTS)
    for name, title, make in TABLES:
        path = results / f"{name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        if record is not None and (made := make(record)):
            versions = ", ".join(f"{n} {record['versions'][n]}" for n in ("torch", "triton") if n in record["versions"])
            where = f"{record['device']}, {versions}"
            if "copy_bytes_per_second" in record:
                where += f", copy {record['copy_bytes_per_second'] / 1e12:.2f} TB/s"
            parts += [f"{title} (`{Path(name).name}.py`; {where}):", made]
            plot, shows = plots.pop(name, ("", ""))
            if plot and (results / f"{plot}.png").exists():
                parts.append(f"![{shows}](benchmarks/results/{plot}.png)")
    before, rest = README.read_text().split(BEGIN)
    return before + "\n\n".join([BEGIN, *parts, END]) + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(readme())
