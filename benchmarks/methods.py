"""The named methods over lengths 128 to 100000, as LeetDecoding's own benchmark measures its own (batch 1, forward).

    python benchmarks/methods.py [--device cpu] [--quick] [--no-peers] [--seconds N] [--output FOLDER]
    python benchmarks/methods.py --readme        # nothing is timed: results into the table of kernels/README.md

On a CPU times are those of one thread. Every method is compared with the default before it is timed, and the default
with the oracle. Where a method would take more memory than there is, or longer than a call is worth, the table says so
instead. LeetDecoding's own methods are measured beside them where the package is installed and can be imported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, cpu_name, one_thread, options, spread, table, timed, timed_in_turns, write
from contenders import Contender, Plan, contenders

from leet_linear_attention import reference

LENGTHS = [128, 512, 2048, 8192, 12800, 25600, 100000]
README = Path(__file__).parents[1] / "kernels" / "README.md"
BEGIN, END = "<!-- measured: benchmarks/methods.py --readme -->", "<!-- end -->"
# Relative RMS difference from the default that rounding explains: each side rounds its output once.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


def inputs(tokens: int, plan: Plan) -> tuple[torch.Tensor, ...]:
    random = torch.Generator(device=plan.device).manual_seed(tokens)

    def normal() -> torch.Tensor:
        shape = (1, tokens, plan.heads, plan.width)
        x = torch.randn(shape, device=plan.device, generator=random)
        return (x / plan.width**0.25).to(plan.dtype)

    # Slopes of Lightning attention, from 2^(-8 / H) to 2^-8.
    rate = 2.0 ** (-8 * (torch.arange(plan.heads, device=plan.device) + 1) / plan.heads)
    return normal(), normal(), normal(), rate


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(found - wanted) / RMS(wanted), infinite where found holds what is no number, or wanted nothing but zeros."""
    found, wanted = found.float(), wanted.float()
    size = wanted.square().mean().sqrt().item()
    apart = (found - wanted).square().mean().sqrt().item()
    return apart / size if size > 0 and apart == apart else float("inf")


def refusal(contender: Contender, tokens: int, plan: Plan) -> str | None:
    """Why a length is not tried."""
    if contender.call is None:
        return contender.missing
    free = torch.cuda.mem_get_info()[0] if plan.device == "cuda" else available_memory()
    if contender.memory(tokens, plan) > 0.7 * free:
        return f"memory: {contender.memory(tokens, plan) / 1e9:.0f} GB of scores"
    if contender.seconds(tokens) > plan.call_seconds:
        return f"time: about {contender.seconds(tokens):.1f} s a call"
    return None


def available_memory() -> int:
    """Bytes a CPU process can still take, by /proc/meminfo; 4 GB where that does not exist."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), 4 * 1000**3)


@torch.no_grad()
def measure(tokens: int, plan: Plan, all_of_them: list[Contender], until: float) -> list[dict[str, Any]]:
    """One row per contender: milliseconds and difference from the default, or why it was left out."""
    q, k, v, rate = inputs(tokens, plan)
    wanted = all_of_them[0].call(q, k, v, rate)  # type: ignore[misc]  # the default always can
    if tokens == min(plan.lengths):
        oracle = reference.quadratic(q, k, v, -rate)[0]
        found = difference(wanted, oracle)
        if found > TOLERANCE[plan.dtype]:
            raise SystemExit(f"the default is {found:.1e} from the oracle at T={tokens}: nothing was timed")
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for contender in all_of_them:
        row = rows[contender.name] = {"tokens": tokens, "method": contender.name}
        why = refusal(contender, tokens, plan)
        if why is None and time.perf_counter() > until:
            why = f"time: the {plan.seconds:.0f} s for everything are over"
        if why is not None:
            row["left out"] = why
            continue

        def call(contender: Contender = contender) -> torch.Tensor:
            return contender.call(q, k, v, rate)  # type: ignore[misc]

        try:
            start = time.perf_counter()
            found = difference(call(), wanted)  # reading it waits for the device
            first = time.perf_counter() - start
        except Exception as error:  # out of memory, or a peer's limits: a line of the table
            row["left out"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            contender.call, contender.missing = None, row["left out"]
            continue
        contender.last = (tokens, first)  # of a wrong result too: it is tried again at the next length
        row["difference"] = found
        if not found <= TOLERANCE[plan.dtype]:
            row["left out"] = f"wrong: {found:.1e} from the default"
            continue
        calls[contender.name] = call
    for name, times in time_all(calls, plan, {c.name: c for c in all_of_them}).items():
        rows[name].update({"ms": times["median"], "spread": times})
        next(c for c in all_of_them if c.name == name).last = (tokens, times["median"] * 1e-3)
    return list(rows.values())


def time_all(
    calls: dict[str, Callable[[], torch.Tensor]], plan: Plan, named: dict[str, Contender]
) -> dict[str, dict[str, float]]:
    """On a CPU in turns; on a GPU one after another, by device events where a call is short."""
    if plan.device == "cpu":
        quick = {n: f for n, f in calls.items() if named[n].last[1] < 0.25}  # type: ignore[index]
        slow = {n: f for n, f in calls.items() if n not in quick}
        return {**timed_in_turns(quick, 9, "cpu"), **timed_in_turns(slow, 2, "cpu")}
    results = {}
    for name, function in calls.items():
        once = timed_in_turns({name: function}, 1, "cuda")[name]["median"]
        if once < 20:
            results[name] = timed(function, warmup=5, rep=40)
        else:
            more = [timed_in_turns({name: function}, 1, "cuda")[name]["median"] for _ in range(1 if once > 300 else 3)]
            results[name] = spread([once, *more])
    return results


def comparison(record: dict[str, Any]) -> str:
    """Methods by lengths as a Markdown table of milliseconds; then what was left out, and why.

    In bold: the fastest, and what is within a tenth of it.
    """
    lengths = record["lengths"]
    cells = {(row["method"], row["tokens"]): row for row in record["rows"]}
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    reasons: dict[str, int] = {}
    best = {t: min(row["ms"] for (name, tokens), row in cells.items() if tokens == t and "ms" in row) for t in lengths}

    def cell(name: str, tokens: int) -> str:
        row = cells[name, tokens]
        if "ms" in row:
            return f"**{row['ms']:.3g}**" if row["ms"] <= 1.1 * best[tokens] else f"{row['ms']:.3g}"
        return f"({reasons.setdefault(row['left out'], len(reasons) + 1)})"

    measured = [n for n in names if any("ms" in cells[n, t] for t in lengths)]
    lines = [{"ms at T =": f"`{n}`", **{str(t): cell(n, t) for t in lengths}} for n in measured]
    out = table(lines, ["ms at T =", *map(str, lengths)])
    if reasons:
        out += "\n\n" + "; ".join(f"({i}) {why}" for why, i in reasons.items()) + "."
    absent: dict[str, list[str]] = {}
    for name in names:
        if name not in measured:
            absent.setdefault(cells[name, lengths[0]]["left out"], []).append(f"`{name}`")
    if absent:
        out += "\n\nNot measured: " + "; ".join(f"{', '.join(who)}: {why}" for why, who in absent.items()) + "."
    return out


def plot(record: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6))
    for name in dict.fromkeys(row["method"] for row in record["rows"]):
        points = [row for row in record["rows"] if row["method"] == name and "ms" in row]
        if not points:
            continue
        x, y = [row["tokens"] for row in points], [row["ms"] for row in points]
        error = [
            [row["ms"] - row["spread"]["low"] for row in points],
            [row["spread"]["high"] - row["ms"] for row in points],
        ]
        style = "k-" if name.endswith("(auto)") else "--" if name.startswith("LeetDecoding") else "-"
        axis.errorbar(x, y, error, fmt=style, marker="o", markersize=3, capsize=2, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms, forward")
    axis.set_title(f"{record['shape']} on {record['device']}")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readme(results: Path = RESULTS) -> str:
    """kernels/README.md with the tables of every methods*.json in place of those it holds."""
    parts = []
    for path in sorted(results.glob("methods*.json")):
        record = json.loads(path.read_text())
        packages = ", ".join(
            f"{name} {record['versions'][name]}" for name in ("torch", "triton") if name in record["versions"]
        )
        parts.append(f"{record['shape']} on {record['device']} ({packages}; `benchmarks/results/{path.name}`):")
        parts.append(comparison(record))
    text = README.read_text()
    before, rest = text.split(BEGIN)
    return before + "\n\n".join([BEGIN, *parts, END]) + rest.split(END)[1]


def main() -> None:
    parser = options(__doc__, quick="the first two lengths")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=110, help="start no new measurement after this many seconds")
    parser.add_argument("--readme", action="store_true", help="only put the results there are into kernels/README.md")
    chosen = parser.parse_args()
    if chosen.readme:
        README.write_text(readme())
        return
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA device: none was found")
    if chosen.device == "cuda":
        plan = Plan("cuda", LENGTHS, 32, 128, torch.float16, 1.0, chosen.seconds)
    else:
        one_thread()
        plan = Plan("cpu", LENGTHS, 8, 64, torch.float32, 2.0, chosen.seconds)
    lengths = plan.lengths[: 2 if chosen.quick else None]
    until = time.perf_counter() + plan.seconds
    everyone = contenders(plan, peers=not chosen.no_peers)
    rows = []
    for tokens in lengths:
        rows += measure(tokens, plan, everyone, until)
        print(
            f"T={tokens} ms: "
            + ", ".join(f"{r['method']} {r['ms']:.3g}" for r in rows if r["tokens"] == tokens and "ms" in r),
            flush=True,
        )
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    dtype = str(plan.dtype).removeprefix("torch.")
    payload: dict[str, Any] = {
        "shape": f"B1 H{plan.heads} D{plan.width} {dtype}, one decay per head, forward",
        "lengths": lengths,
        "rows": rows,
    }
    if plan.device == "cpu":
        payload["device"] = cpu_name()
    path = write("methods" if plan.device == "cuda" else "methods-cpu", payload, chosen.output)
    record = json.loads(path.read_text())
    print(comparison(record))
    plot(record, path.with_suffix(".png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
