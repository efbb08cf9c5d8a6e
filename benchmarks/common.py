"""What every benchmark shares: the machine's description, the copy floor, timing, and results as a table and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def options(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options all benchmarks have; ``quick`` says what --quick measures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def require_cuda() -> None:
    """Leave with a message where there is nothing to measure on; settle the random numbers."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks need a CUDA device: none was found")
    torch.manual_seed(0)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "flash-linear-attention", "fla-core", "leetDecoding"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor and how many threads torch uses of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, counting bytes read and bytes written."""
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    milliseconds = timed(lambda: y.copy_(x))["median"]
    return 2 * x.numel() * x.element_size() / (milliseconds * 1e-3)


def timed(function: Callable[[], Any], warmup: int = 10, rep: int = 60) -> dict[str, float]:
    """Milliseconds of a GPU function by device events: median and the 20 and 80 % quantiles; L2 is flushed between."""
    from triton.testing import do_bench

    median, low, high = do_bench(function, warmup=warmup, rep=rep, quantiles=[0.5, 0.2, 0.8])
    return {"median": median, "low": low, "high": high}


def timed_or_why(function: Callable[[], Any], must: bool, rep: int) -> dict[str, float] | str:
    """As `timed`, or in words why a contender refuses; one that `must` run may not."""
    try:
        return timed(function, rep=rep)
    except Exception as error:
        if must:
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]


def timed_in_turns(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one call of each function a round, so that all meet the same disturbances: see `spread`.

    On a GPU by the wall clock, each call waited for. On a CPU in processor time of one thread, which is what an idle
    machine's clock would show, each call after one that is not timed and brings the caches back.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.thread_time
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if device != "cuda":
                function()
            wait()
            start = clock()
            function()
            wait()
            samples[name].append((clock() - start) * 1e3)
    return {name: spread(values) for name, values in samples.items()}


def one_thread() -> None:
    """What is timed on a CPU runs in the calling thread."""
    torch.set_num_threads(1)


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 20 and 80 % quantiles, and the least of some samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return {"median": statistics.median(ordered), "low": low, "high": high, "least": ordered[0]}


def timed_graph(function: Callable[[], Any], calls: int, rep: int = 60) -> dict[str, float]:
    """Milliseconds of one of ``calls`` calls replayed in a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return {key: value / calls for key, value in timed(graph.replay, rep=rep).items()}


def timed_host(function: Callable[[], Any], calls: int = 200) -> dict[str, float]:
    """Milliseconds of host time of a call: calls are issued without waiting for the device."""
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls * 1e3)
    samples.sort()
    return {"median": statistics.median(samples), "low": samples[0], "high": samples[-1]}


def prompt(batch: int, tokens: int, device: str, vocab: int) -> torch.Tensor:
    """Random tokens [batch, tokens], the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (batch, tokens), generator=generator).to(device)


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call by a clock, with the GPU's work before and after it done where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begin


def first_call(function: Callable[[], Any]) -> float:
    """Seconds of a call and its device work, compiling included where it is the first."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Nothing(torch.autograd.Function):
    """Takes q, k, v and gives outputs and gradients of the operator's shapes, none of them computed: autograd alone."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return v.new_empty(*q.shape[:3], v.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


CORE = ("python", "torch", "triton", "transformers")


def write(name: str, payload: dict[str, Any], folder: Path = RESULTS, part_by: str | tuple[str, ...] = ()) -> Path:
    """Write ``payload`` with device and versions to ``folder/name.json``.

    part_by: for a run of a part, the field or fields its "rows" are told apart by: rows there with other values of
    these stay, if they are from the same device and versions of `CORE`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {"device": device_name(), "versions": versions(), **payload}
    if part_by and path.exists():
        _merge(record, json.loads(path.read_text()), (part_by,) if isinstance(part_by, str) else part_by)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
    return path


def _merge(record: dict[str, Any], old: dict[str, Any], fields: tuple[str, ...]) -> None:
    if record["device"] != old["device"] or any(record["versions"].get(n) != old["versions"].get(n) for n in CORE):
        return

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[field] for field in fields)

    rows = record["rows"]
    fresh = {name(row) for row in rows}
    order = list(dict.fromkeys(name(row) for row in [*old["rows"], *rows]))
    rows = [*(row for row in old["rows"] if name(row) not in fresh), *rows]
    record["rows"] = sorted(rows, key=lambda row: order.index(name(row)))
    record["versions"] = old["versions"] | record["versions"]


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table of those columns that some row has; numbers to three digits."""
    columns = [column for column in columns if any(column in row for row in rows)]

    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
