"""Block shapes of the sweep side by side: what the table in tuning.py is chosen from.

python benchmarks/blocks.py [--quick] [--only SUBSTRING] [--output FOLDER]
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from common import copy_bandwidth, options, require_cuda, table, timed, write

from leet_linear_attention.triton.launch import Operands, Sweep, Terms
from leet_linear_attention.triton.tuning import SweepConfig

# (chunk, rows, columns, warps, stages)
D128 = [(64, 128, 64, 4, 3), (64, 128, 64, 4, 2), (64, 128, 64, 8, 3), (64, 128, 128, 8, 2), (64, 128, 128, 8, 3)]
WIDE = [(64, 256, 64, 8, 2), (64, 256, 64, 8, 1), (64, 256, 32, 8, 2), (64, 128, 64, 4, 3), (32, 256, 64, 8, 3)]
TERMS = [(64, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 128, 64, 8, 1)]


@dataclass(frozen=True)
class Pass:
    """One pass over time: B, T, H, width of rows and keys, of values; decay as the sweep numbers it."""

    batch: int
    tokens: int
    heads: int
    x: int
    y: int
    decay: int = 1
    reverse: bool = False
    terms: bool = False

    def __str__(self) -> str:
        kind = ("no decay", "per head", "per token")[self.decay]
        way = " backward" if self.reverse else ""
        more = " with terms" if self.terms else ""
        return f"B{self.batch} T{self.tokens} H{self.heads} X{self.x} Y{self.y} {kind}{way}{more}"


TRIALS = {
    Pass(4, 8192, 32, 128, 128): D128,
    Pass(4, 8192, 32, 128, 128, reverse=True): D128[:2],
    Pass(4, 8192, 32, 128, 128, decay=2): D128[:4],
    Pass(4, 8192, 32, 128, 128, decay=2, reverse=True, terms=True): TERMS,
    Pass(2, 4096, 8, 256, 512): WIDE,
    Pass(2, 4096, 8, 512, 256, reverse=True): WIDE,
    Pass(4, 8192, 32, 64, 64): [(64, 64, 64, 4, 3), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (128, 64, 64, 4, 2)],
}


def runner(trial: Pass, config: SweepConfig, tokens: int) -> Any:
    """A function that runs the pass once, over ``tokens`` tokens."""
    batch, heads = trial.batch, trial.heads

    def normal(width: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, width, device="cuda", dtype=torch.bfloat16)

    decay = None
    if trial.decay:
        decay = -torch.rand((batch, tokens, heads) if trial.decay == 2 else (heads,), device="cuda") * 0.3
    x = Operands(normal(trial.x), normal(trial.x), normal(trial.y), decay, None)
    sweep = Sweep(x, heads, reverse=trial.reverse, config=config)
    if not trial.terms:
        return lambda: sweep.run(x, None)
    states = sweep.chunk_states(x.a, normal(trial.y), normal(trial.x))
    terms = Terms(normal(trial.y), torch.empty(2, sweep.tiles, batch, tokens, heads, device="cuda"))
    return lambda: sweep.run(x, None, chunk_states=states, terms=terms)


def compile_one(trial: Pass, block: tuple[int, ...]) -> None:
    """Leaves the compiled kernel in Triton's cache on disk."""
    try:
        runner(trial, SweepConfig(*block), 256)()
    except Exception as error:
        print(f"{trial} {block}: {error}"[:300], flush=True)


@torch.no_grad()
def measure(trial: Pass, block: tuple[int, ...], bandwidth: float) -> dict[str, Any]:
    """Milliseconds of one pass with a block shape, and the fraction of reading and writing each tensor once."""
    row: dict[str, Any] = {"pass": str(trial), "chunk, rows, columns, warps, stages": str(block)}
    try:
        row["spread"] = timed(runner(trial, SweepConfig(*block), trial.tokens))
    except Exception as error:
        return row | {"why not": str(error)[:80]}
    row["ms"] = row["spread"]["median"]
    size = trial.batch * trial.tokens * trial.heads * 2 * (2 * trial.x + 2 * trial.y)
    return row | {"of floor %": 100 * size / bandwidth * 1e3 / row["ms"]}


def main() -> None:
    parser = options(__doc__, quick="the first pass")
    parser.add_argument("--only", default="", help="passes whose name contains this")
    chosen = parser.parse_args()
    require_cuda()
    bandwidth = copy_bandwidth()
    trials = [(t, b) for t, blocks in TRIALS.items() for b in blocks if chosen.only in str(t)]
    if chosen.quick:
        trials = [(t, b) for t, b in trials if t == trials[0][0]]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*trials, strict=True)))
    rows = []
    for trial, block in trials:
        rows.append(measure(trial, block, bandwidth))
        torch.cuda.empty_cache()
    columns = ["pass", "chunk, rows, columns, warps, stages", "ms", "of floor %", "why not"]
    print(table(rows, columns))
    print(f"wrote {write('blocks', {'copy_bytes_per_second': bandwidth, 'rows': rows}, chosen.output)}")


if __name__ == "__main__":
    main()
