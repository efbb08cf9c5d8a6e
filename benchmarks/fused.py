"""Fused kernels around the operator against the torch formulas they stand for, and against their bytes at copy speed.

python benchmarks/fused.py [--quick] [--only SUBSTRING] [--no-peers] [--output FOLDER]

Every time is of a CUDA graph. A few rows are those of a decode step: many calls in one graph, whose inputs stay in the
cache as far as they fit. Thousands of rows are a prefill: one call, after the cache was flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import copy_bandwidth, options, require_cuda, table, timed_graph, timed_host, write
from torch import Tensor

from leet_hf.fused.glu import gated
from leet_hf.fused.joined import joined_linear
from leet_hf.fused.norm import rms_norm
from leet_hf.fused.rotary import turned
from leet_hf.fused.silu_split import silu_split

FEW = 256  # rows of a decode step, at the most
EPS = 1e-6


class Case(NamedTuple):
    """A kernel at one shape. inputs: what has gradients. ours, peer: the same function of them, to a tensor or several.
    again: whether the gradients need the inputs. backward: whether there are gradients.
    """

    kernel: str
    shape: str
    rows: int
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Any]
    peer: Callable[..., Any]
    again: bool = True
    backward: bool = True


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def minimax_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers computes it."""
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def minimax_gated(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return torch.sigmoid(gate) * minimax_norm(x, weight)


def retnet_gated(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """In float32, rounded once, as RetNet is computed without kernels."""
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), EPS)
    return (normed * F.silu(gate.float())).to(x.dtype)


def ours_gated(x: Tensor, weight: Tensor, gate: Tensor, activation: str, each: bool) -> Tensor:
    return rms_norm(x, weight, gate=gate, activation=activation, each=each, eps=EPS)


def norms() -> Iterator[Case]:
    """Norms of a hidden state, of a layer's output with its gate, and of each head."""
    for rows, dim in ((1, 2048), (64, 2048), (8192, 2048), (8192, 4096)):
        x, weight, gate = normal(rows, dim), normal(dim), normal(rows, dim)
        shape = f"{rows} x {dim}"
        yield Case("norm", shape, rows, (x, weight), partial(rms_norm, eps=EPS), minimax_norm)
        with_gate = partial(ours_gated, activation="sigmoid", each=True)
        yield Case("norm, sigmoid gate", shape, rows, (x, weight, gate), with_gate, minimax_gated)
        heads = (rows, dim // 512, 512)
        inputs = (x.view(heads), weight[:512], gate.view(heads))
        with_gate = partial(ours_gated, activation="silu", each=False)
        yield Case("norm of heads, swish gate", f"{rows} x {dim // 512} x 512", rows, inputs, with_gate, retnet_gated)


def rotations() -> Iterator[Case]:
    """q and k of a RetNet of 1.35B turned, contiguous as from projections of their own; and of a model by pairs."""
    for kind in ("rope", "theta_shift"):
        for batch, tokens in ((1, 1), (64, 1), (1, 8192)):
            q, k = (normal(batch, tokens, 8, 256) for _ in range(2))
            angles = torch.rand(1, tokens, 1, 128, device="cuda") * 6
            turn = partial(turned, cos=angles.cos(), sin=angles.sin(), kind=kind)
            shape = f"{batch} x {tokens} x 8 x 256, q and k"
            yield Case(f"rotary, {kind}", shape, batch * tokens, (q, k), turn, partial(turn, method="torch"), False)


def units() -> Iterator[Case]:
    """Gated linear units of a hidden size of 2048, as FLA sizes them."""
    for rows in (1, 64, 8192):
        gate, up = normal(rows, 2816), normal(rows, 2816)
        gate_silu = partial(gated, activation="silu")
        yield Case("silu(gate) * up", f"{rows} x 2816", rows, (gate, up), gate_silu, partial(gate_silu, method="torch"))


def splits() -> Iterator[Case]:
    """SiLU of MiniMax's packed projection: forward one SiLU for both, backward a kernel instead of two."""
    for batch, tokens in ((1, 64), (1, 8192)):
        split = partial(silu_split, dim=128)
        packed = normal(batch, tokens, 16 * 3 * 128)
        shape = f"{batch} x {tokens} x 16 x 3 x 128"
        yield Case("silu, split", shape, batch * tokens, (packed,), split, partial(split, method="torch"))


def linears() -> Iterator[Case]:
    """Linear layers of one input in a recorded step, of a small model and of one with a hidden size of 2048."""
    for dtype, rows, sizes, width in (
        (torch.float32, 8, (768, 192), 192),
        (torch.float32, 16, (768, 192), 192),
        (torch.float32, 8, (2048, 2048, 4096, 4096), 2048),
        (torch.float32, 16, (2048, 2048, 4096, 4096), 2048),
        (torch.bfloat16, 1, (2048, 2048, 4096, 4096), 2048),
        (torch.bfloat16, 8, (2048, 2048, 4096, 4096), 2048),
    ):
        inputs = tuple(normal(n, width, dtype=dtype) for n in (rows, *sizes))
        name = f"linear layers, {str(dtype).removeprefix('torch.')}"
        shape = f"{rows} x {width} to {', '.join(map(str, sizes))}"
        yield Case(name, shape, rows, inputs, ours_linears, torch_linears, backward=False)


def ours_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(joined_linear(x, [*weights]))


def torch_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


CASES: list[Callable[[], Iterator[Case]]] = [norms, rotations, units, splits, linears]


def tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def floors(case: Case, out: tuple[Tensor, ...], bandwidth: float) -> tuple[float, float]:
    """Microseconds of the bytes of forward, and of forward with backward: each tensor moved once by each of both."""
    read, written = (sum(t.nbytes for t in tensors) for tensors in (case.inputs, out))
    forward, backward = read + written, (1 + case.again) * read + written
    return forward / bandwidth * 1e6, (forward + backward) / bandwidth * 1e6


def measure(case: Case, bandwidth: float, peers: bool) -> dict[str, Any]:
    leaves = tuple(t.detach().requires_grad_() for t in case.inputs)
    out = tensors(case.ours(*case.inputs))  # and the kernel is compiled
    dout = [torch.randn(x.shape, device=x.device, dtype=x.dtype) for x in out]
    peer = tensors(case.peer(*case.inputs))
    error = max((a.float() - b.float()).norm() / a.float().norm() for a, b in zip(out, peer, strict=True))
    if not error <= 1e-2:
        raise RuntimeError(f"{case.kernel} at {case.shape} differs from its formula by {error:.2g}")
    calls = 50 if case.rows <= FEW else 1
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape}
    row["floor us"], both_floor = floors(case, out, bandwidth)
    if case.backward:
        row["both floor us"] = both_floor

    def both(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, dout)

    for name, function in (("", case.ours), ("torch ", case.peer)) if peers else (("", case.ours),):
        ways = {"": partial(function, *case.inputs)} | ({"both ": partial(both, function)} if case.backward else {})
        for way, call in ways.items():
            found = timed_graph(call, calls)
            row[f"{name}{way}spread us"] = {key: value * 1e3 for key, value in found.items()}
            row[f"{name}{way}us"] = found["median"] * 1e3
        if case.rows <= FEW:
            row[f"{name}host us"] = timed_host(partial(function, *case.inputs))["median"] * 1e3
    for way in ("", "both "):
        if f"torch {way}us" in row:
            row[f"{way}x torch"] = row[f"torch {way}us"] / row[f"{way}us"]
    return row


def main() -> None:
    parser = options(__doc__, quick="the first shape of each family, no peers")
    parser.add_argument("--only", default="", help="kernels whose name contains this; others' results stay as they are")
    chosen = parser.parse_args()
    require_cuda()
    bandwidth = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for family in CASES:
        for case in family():
            if chosen.only not in case.kernel:
                continue
            rows.append(measure(case, bandwidth, not (chosen.quick or chosen.no_peers)))
            record = {"copy_bytes_per_second": bandwidth, "rows": rows}
            path = write("fused", record, chosen.output, part_by=("kernel", "shape") if chosen.only else ())
            if chosen.quick:
                break
    columns = ["kernel", "shape", "us", "torch us", "x torch", "floor us", "host us", "torch host us"]
    columns += ["both us", "torch both us", "both x torch", "both floor us"]
    if not rows:
        raise SystemExit(f"--only {chosen.only!r} names no kernel")
    print(table(rows, columns))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
