"""The decode step in a CUDA graph, averaged over whole buffer cycles, against reading the state once and against FLA.

python benchmarks/step.py [--quick] [--no-peers] [--output FOLDER]
"""

from __future__ import annotations

from typing import Any

import torch
from common import copy_bandwidth, first_call, options, require_cuda, table, timed_graph, write

from leet_linear_attention import DecodeState, linear_attention_step

SHAPES = [(1, 64, 128, 128), (64, 64, 128, 128), (256, 64, 128, 128), (64, 8, 256, 512)]
BUFFER = 16


def tokens(batch: int, heads: int, key_dim: int, value_dim: int, count: int) -> tuple[torch.Tensor, ...]:
    def normal(width: int) -> torch.Tensor:
        return torch.randn(batch, count, heads, width, device="cuda", dtype=torch.bfloat16)

    return normal(key_dim), normal(key_dim), normal(value_dim), -torch.rand(heads, device="cuda") * 0.3


def fla_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, state: torch.Tensor) -> Any:
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return None
    return lambda: fused_recurrent_simple_gla(
        q, k, v, g_gamma=g, scale=1.0, initial_state=state, output_final_state=True
    )


@torch.no_grad()
def measure(shape: tuple[int, int, int, int], bandwidth: float, peers: bool) -> dict[str, Any]:
    batch, heads, key_dim, value_dim = shape
    row: dict[str, Any] = {"shape": f"B{batch} H{heads} K{key_dim} V{value_dim}"}
    row["read state us"] = batch * heads * key_dim * value_dim * 4 / bandwidth * 1e6
    state = DecodeState.allocate(batch, heads, key_dim, value_dim, buffer=BUFFER, dtype=torch.bfloat16, device="cuda")
    for count in (1, 4):
        q, k, v, g = tokens(*shape, count)

        def step(q=q, k=k, v=v, g=g) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return linear_attention_step(q, k, v, g, state)

        row[f"first T{count} s"] = first_call(step)
        cycle = 2 * BUFFER // count
        spread = timed_graph(step, cycle)
        row[f"T{count} spread us"] = {key: value * 1e3 for key, value in spread.items()}
        row[f"T{count} us"] = spread["median"] * 1e3
    row["T4 / T1"] = row["T4 us"] / row["T1 us"]
    row["of state read %"] = 100 * row["read state us"] / row["T1 us"]
    if peers:
        q, k, v, g = tokens(*shape, 1)
        peer = fla_step(q, k, v, g, torch.randn(batch, heads, key_dim, value_dim, device="cuda"))
        if peer is not None:
            row["fla us"] = timed_graph(peer, 8)["median"] * 1e3
            row["x fla"] = row["fla us"] / row["T1 us"]
    return row


def main() -> None:
    chosen = options(__doc__, quick="one shape, no peers").parse_args()
    require_cuda()
    bandwidth = copy_bandwidth()
    shapes = SHAPES[:1] if chosen.quick else SHAPES
    rows = [measure(shape, bandwidth, not (chosen.quick or chosen.no_peers)) for shape in shapes]
    columns = ["shape", "T1 us", "fla us", "x fla", "read state us", "of state read %"]
    columns += ["T4 us", "T4 / T1", "first T1 s"]
    print(table(rows, columns))
    path = write("step", {"copy_bytes_per_second": bandwidth, "buffer": BUFFER, "rows": rows}, chosen.output)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
