"""Linear layers of a decode step's few rows: several of one input in one launch, alone or with their gated unit.

A weight of a few megabytes is read in less time than its launch needs to reach the memory's speed; together they do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leet_linear_attention.dispatch import available_methods

MOST_ROWS = 16  # all of them are in every program's tile
MOST_WEIGHTS = 4
WARPS, STAGES = 4, 4
# Rows of weights and numbers of each in a program's tile: where there are many rows to share out, and where few.
MANY, FEW = (32, 128), (16, 256)
FEW_ROWS = 6144
AHEAD = 16 << 20  # bytes of weights that a launch asks for while it waits for its input: they have to fit the L2 cache


def joined_linear(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`F.linear(x, w)` for one to `MOST_WEIGHTS` weights [Ni, D] in one launch, without gradients.

    x [..., D] of at most `MOST_ROWS` rows; all contiguous and of one 16-bit dtype. Sums are float32, rounded once.
    """
    from leet_linear_attention.triton.launcher import device_index

    from .joined_kernel import products  # imports triton

    width = x.shape[-1]
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    missing = MOST_WEIGHTS - len(weights)
    columns, step = FEW if sum(sizes) <= FEW_ROWS else MANY
    products(
        (sum(-(-size // columns) for size in sizes),), device_index(x),
        (x, *weights, *weights[:1] * missing, *outs, *outs[:1] * missing),
        (x.numel() // width, *sizes, *[0] * missing, _ahead(weights, columns)),
        (len(weights), width, MOST_ROWS, columns, step), WARPS, STAGES,
    )  # fmt: skip
    return outs


def gated_linear(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """(`F.linear(x, gate)`, `F.linear(x, up)`, `act` of the first times the second) in one launch.

    As `joined_linear`, for two weights [N, D]; activation: "silu" or "gelu", as `leet_hf.fused.glu.gated`.
    """
    from leet_linear_attention.triton.launcher import device_index

    from .joined_kernel import gated_pair  # imports triton

    width, size = x.shape[-1], gate.shape[0]
    outs = [x.new_empty(*x.shape[:-1], size) for _ in range(3)]
    columns, step = FEW[0], MANY[1]  # of each: as much as a program for many rows has
    gated_pair(
        (-(-size // columns),), device_index(x), (x, gate, up, *outs),
        (x.numel() // width, size, _ahead([gate, up], columns)),
        (activation == "gelu", width, MOST_ROWS, columns, step), WARPS, STAGES,
    )  # fmt: skip
    return outs[0], outs[1], outs[2]


def _ahead(weights: list[Tensor], columns: int) -> int:
    """How many entries of each row are asked for early: a whole number of 16 bytes for every thread of a row."""
    width = weights[0].shape[1]
    unit = 8 * (WARPS * 32 // columns)
    if width % 8 or any(weight.data_ptr() % 16 for weight in weights):
        return 0
    rows = sum(weight.shape[0] for weight in weights)
    return min(width, AHEAD // (2 * rows)) // unit * unit


def joinable(x: Tensor, weight: Tensor, device_type: str) -> bool:
    """Whether the kernels serve `F.linear(x, weight)`."""
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2:
        return False
    if x.device.type != device_type or weight.device != x.device or torch.is_autocast_enabled(x.device.type):
        return False
    if x.dtype != weight.dtype or x.element_size() != 2 or not x.is_floating_point():
        return False
    if x.dim() == 0 or not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or x.shape[-1] != weight.shape[1]:
        return False
    if not (x.is_contiguous() and weight.is_contiguous()) or weight.numel() == 0:
        return False
    return available_methods(x.device, x.dtype)["triton"] is None
