"""Linear layers of one input in a decode step, such as q, k, v and a gate: one launch for all of them.

A weight of a few megabytes is read in less time than its launch needs to reach the memory's speed; together they do.
Which layers share an input is seen in a first run of the step, so nothing has to be known of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leet_linear_attention.dispatch import available_methods

MOST_ROWS = 16  # all of them are in every program's tile
MOST_WEIGHTS = 4
# Rows of a weight and numbers of each in a program's tile, warps, stages.
TILE = (32, 128, 4, 4)


def joined_linear(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """`F.linear(x, w)` for two to `MOST_WEIGHTS` weights [Ni, D] in one launch, without gradients.

    x [..., D] of at most `MOST_ROWS` rows; all contiguous and of one 16-bit dtype. Sums are float32, rounded once.
    """
    from leet_linear_attention.triton.launcher import device_index

    from .joined_kernel import products  # imports triton

    width = x.shape[-1]
    outs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    sizes = [weight.shape[0] for weight in weights]
    missing = MOST_WEIGHTS - len(weights)
    columns, step, warps, stages = TILE
    products(
        (sum(-(-size // columns) for size in sizes),), device_index(x),
        (x, *weights, *weights[:1] * missing, *outs, *outs[:1] * missing), (x.numel() // width, *sizes, *[0] * missing),
        (len(weights), width, MOST_ROWS, columns, step), warps, stages,
    )  # fmt: skip
    return outs


class Joined(TorchFunctionMode):
    """Inside it, for the second time and later, linear layers that had one input in the first run have one launch.

    The first of them computes all; the others are given what it computed, if they ask for the same product of an
    input nothing has written to since (which tensors of inference mode can not tell), and else compute it themselves.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self._device_type = device_type
        self._watched: list[tuple[Tensor, int, Tensor]] = []
        self._groups: dict[int, list[Tensor]] | None = None  # by the id of the weight that comes first
        self._early: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __enter__(self) -> Joined:
        self._watched, self._early = [], {}
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self._groups is None and error is None:
            self._groups = self._found()
        self._watched, self._early = [], {}

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear and not kwargs and len(args) in (2, 3) and args[2:] in ((), (None,)):
            x, weight = args[:2]
            if self._serves(x, weight):
                if self._groups is not None:
                    return self._product(x, weight, self._groups)
                self._watched.append((x, _version(x), weight))
        return function(*args, **(kwargs or {}))

    def _product(self, x: Tensor, weight: Tensor, groups: dict[int, list[Tensor]]) -> Tensor:
        held = self._early.pop(id(weight), None)
        if held is not None and held[0] is x and held[1] == _version(x):
            return held[2]
        group = groups.get(id(weight))
        if group is None or any(w.device != x.device or w.dtype != x.dtype for w in group):
            return F.linear(x, weight)
        first, *others = joined_linear(x, group)
        self._early |= {id(w): (x, _version(x), out) for w, out in zip(group[1:], others, strict=True)}
        return first

    def _found(self) -> dict[int, list[Tensor]]:
        """Weights of one input, each group run once: what a recording launches has to be compiled before."""
        by_input: dict[tuple[int, int], tuple[Tensor, dict[int, Tensor]]] = {}
        for x, version, weight in self._watched:
            by_input.setdefault((id(x), version), (x, {}))[1].setdefault(id(weight), weight)
        groups = {}
        for x, weights in by_input.values():
            every = [*weights.values()]
            for group in (every[i : i + MOST_WEIGHTS] for i in range(0, len(every), MOST_WEIGHTS)):
                if len(group) > 1:
                    joined_linear(x, group)
                    groups[id(group[0])] = group
        return groups

    def _serves(self, x: Any, weight: Any) -> bool:
        if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 2:
            return False
        if x.device.type != self._device_type or weight.device != x.device or torch.is_autocast_enabled(x.device.type):
            return False
        if x.dtype != weight.dtype or x.element_size() != 2 or not x.is_floating_point():
            return False
        if x.dim() == 0 or not 0 < x.numel() <= MOST_ROWS * x.shape[-1] or x.shape[-1] != weight.shape[1]:
            return False
        if not (x.is_contiguous() and weight.is_contiguous()) or weight.numel() == 0:
            return False
        return available_methods(x.device, x.dtype)["triton"] is None


def _version(x: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return -1 if x.is_inference() else x._version
