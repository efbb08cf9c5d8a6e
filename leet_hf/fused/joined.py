"""Linear layers of a decode step's few rows: several of one input in one launch, alone or with their gated unit.

A weight of a few megabytes is read in less time than its launch needs to reach the memory's speed; together they do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leet_linear_attention.dispatch import available_methods
from leet_linear_attention.precision import products_are_exact

from .route import NARROW

MOST_ROWS = 16  # all of them are in every program's tile
MOST_WEIGHTS = 4
# Rows of weights, numbers of each, warps and stages of a program's tile: of several weights, of a pair.
SEVERAL, PAIR = (32, 128, 4, 4), (16, 128, 4, 4)
# Several rows of float32, for which torch takes 40 us or more from some width on, however little there is to read:
# rows of weights with up to 8 rows of input and with more, and how many products a program has registers for.
FLOAT32_ROWS, PRODUCTS = (4, 8), 8192
# The first two for a single row of input, which the matrix units are not asked for; also of one weight.
SEVERAL_ROW, PAIR_ROW, ONE_ROW = (4, 2048, 4, 1), (4, 2048, 4, 1), (8, 2048, 4, 1)


def joined_linear(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`F.linear(x, w)` for one to `MOST_WEIGHTS` weights [Ni, D] in one launch, without gradients.

    x [..., D] of at most `MOST_ROWS` rows; all contiguous and of one dtype, 16-bit or float32. Sums are float32,
    rounded once.
    """
    from leet_linear_attention.triton.launcher import device_index

    from .joined_kernel import products  # imports triton

    width = x.shape[-1]
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    missing = MOST_WEIGHTS - len(weights)
    rows = x.numel() // width
    held, columns, step, warps, stages = _tile(x, rows, SEVERAL, ONE_ROW if len(weights) == 1 else SEVERAL_ROW)
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *outs))
    products(
        (sum(-(-size // columns) for size in sizes),), device_index(x),
        (x, *weights, *weights[:1] * missing, *outs, *outs[:1] * missing),
        (rows, *sizes, *[0] * missing),
        (len(weights), aligned, width, held, columns, step), warps, stages,
    )  # fmt: skip
    return outs


def gated_linear(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(`F.linear(x, gate)`, `F.linear(x, up)`, `act` of the first times the second) in one launch.

    As `joined_linear`, for two weights [N, D] of 16 bits; activation: "silu" or "gelu", as `leet_hf.fused.glu.gated`.
    """
    from leet_linear_attention.triton.launcher import device_index

    from .joined_kernel import gated_pair  # imports triton

    width, size = x.shape[-1], gate.shape[0]
    outs = [x.new_empty(*x.shape[:-1], size) for _ in range(3)]
    rows = x.numel() // width
    held, columns, step, warps, stages = _tile(x, rows, PAIR, PAIR_ROW)
    gated_pair(
        (-(-size // columns),), device_index(x), (x, gate, up, *outs),
        (rows, size), (activation == "gelu", width, held, columns, step), warps, stages,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def _tile(x: Tensor, rows: int, several: tuple[int, ...], one: tuple[int, ...]) -> tuple[int, ...]:
    """(rows of input a program holds, rows of weights, numbers of each, warps, stages) for so many rows of input x."""
    whole = max(128, 1 << (x.shape[-1] - 1).bit_length())
    if rows == 1:
        columns, step, *options = one
        return 1, columns, min(step, whole), *options
    if x.dtype == torch.float32:
        held = 1 << (rows - 1).bit_length()
        columns = FLOAT32_ROWS[rows > 8]
        return held, columns, min(PRODUCTS // (columns * held), whole), 4, 1
    return MOST_ROWS, *several


def pays_alone(x: Tensor) -> bool:
    """Whether a linear layer whose input no other shares is faster here than by torch: of one row, or of float32."""
    return x.numel() == x.shape[-1] or x.dtype == torch.float32


def joinable(x: Tensor, weight: Tensor, device_type: str) -> bool:
    """Whether the kernels serve `F.linear(x, weight)`."""
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2:
        return False
    if x.device.type != device_type or weight.device != x.device or torch.is_autocast_enabled(x.device.type):
        return False
    if x.dtype != weight.dtype or x.dtype not in NARROW:
        return False
    if x.dim() == 0 or not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or x.shape[-1] != weight.shape[1]:
        return False
    if x.dtype == torch.float32 and (x.numel() == x.shape[-1] or not products_are_exact()):
        return False  # torch is as fast with one row; and who allows it TF32 gets that
    if not (x.is_contiguous() and weight.is_contiguous()) or weight.numel() == 0:
        return False
    return available_methods(x.device, x.dtype)["triton"] is None
