"""Block shapes of the sweep side by side: what the table in tuning.py is chosen from.

python benchmarks/blocks.py [--quick] [--output FOLDER]
"""

from __future__ import annotations

from typing import Any

import torch
from common import copy_bandwidth, first_call, options, require_cuda, table, timed, write

from leet_linear_attention.triton.launch import sweep
from leet_linear_attention.triton.tuning import SweepConfig

# (batch, tokens, heads, key dim, value dim, decay per token) -> (chunk, columns, warps, stages)
TRIALS = {
    (4, 8192, 32, 128, 128, False): [
        (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2), (64, 128, 4, 3),
        (32, 64, 4, 3), (32, 128, 8, 3), (32, 128, 8, 4), (128, 64, 8, 2), (128, 128, 8, 2),
    ],
    (4, 8192, 32, 128, 128, True): [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 3), (32, 64, 4, 3), (32, 128, 8, 3)],
    (2, 4096, 8, 256, 512, False): [(32, 64, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
}  # fmt: skip


@torch.no_grad()
def measure(shape: tuple[int, int, int, int, int, bool], blocks: list[tuple[int, ...]], bandwidth: float) -> list[Any]:
    """Milliseconds of one pass forward and one backward in time with each block shape."""
    batch, tokens, heads, key_dim, value_dim, per_token = shape
    q, k = (torch.randn(batch, tokens, heads, key_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, device="cuda", dtype=torch.bfloat16)
    decay = -torch.rand((batch, tokens, heads) if per_token else (heads,), device="cuda") * 0.3
    floor = batch * tokens * heads * 2 * (key_dim + value_dim) * 2 / bandwidth * 1e3
    rows = []
    for block in blocks:
        row: dict[str, Any] = {"shape": str(shape), "chunk, columns, warps, stages": str(block)}
        for name, reverse in (("forward", False), ("reversed", True)):

            def run(reverse: bool = reverse, config: SweepConfig = SweepConfig(*block)) -> Any:  # noqa: B008
                return sweep(q, k, v, decay, heads, None, None, reverse=reverse, config=config)

            row[f"{name} first s"] = first_call(run)
            row[f"{name} spread"] = timed(run)
            row[f"{name} ms"] = row[f"{name} spread"]["median"]
        row["of floor %"] = 100 * floor / row["forward ms"]
        rows.append(row)
    return rows


def main() -> None:
    chosen = options(__doc__, quick="the first shape").parse_args()
    require_cuda()
    bandwidth = copy_bandwidth()
    rows = []
    for shape, blocks in list(TRIALS.items())[: 1 if chosen.quick else None]:
        rows += measure(shape, blocks, bandwidth)
        torch.cuda.empty_cache()
    columns = ["shape", "chunk, columns, warps, stages", "forward ms", "of floor %", "reversed ms", "forward first s"]
    print(table(rows, columns))
    print(f"wrote {write('blocks', {'copy_bytes_per_second': bandwidth, 'rows': rows}, chosen.output)}")


if __name__ == "__main__":
    main()
