"""Linear layers of few rows, as a decode step has them: one pass over the weights near the memory's speed.

In a decode step weights are almost all there is to read, and cuBLAS reads those of such layers at about 60 % of the
speed of a copy on an H100 (benchmarks/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leet_linear_attention.dispatch import available_methods

MOST_ROWS = 16
# (tile of outputs, inputs a step, warps, stages)
CONFIG = (16, 256, 4, 5)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `few_rows_linear` is the better `F.linear` for these: 16-bit numbers on a GPU, few rows, no gradients."""
    width = x.shape[-1]
    return (
        x.is_cuda
        and 0 < x.numel() <= MOST_ROWS * width
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and weight.dim() == 2
        and weight.is_contiguous()
        and width % 8 == 0
        and weight.data_ptr() % 16 == 0
        and (bias is None or bias.dtype == x.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cuda")
    )


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for x [..., K] of at most `MOST_ROWS` rows, weight [N, K] contiguous, K a multiple of 8; bias [N].

    Sums are float32, rounded once. No gradients.
    """
    from leet_linear_attention.triton.launcher import device_index

    x = x.contiguous()
    rows, (outputs, width) = x.numel() // x.shape[-1], weight.shape
    out = x.new_empty(*x.shape[:-1], outputs)
    tile, step, warps, stages = CONFIG
    _launcher()(
        (-(-outputs // tile),), device_index(x), (x, weight, bias, out), (rows, outputs, width // 8),
        (MOST_ROWS, tile, step, bias is not None), warps, stages,
    )  # fmt: skip
    return out


class FewRows(TorchFunctionMode):
    """Inside it, `F.linear` takes `few_rows_linear` where that serves: for modules as they are, LoRA's too."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and not kwargs and serves(args[0], args[1], args[2] if len(args) > 2 else None):
            return few_rows_linear(*args)
        return function(*args, **kwargs)


def available(device: torch.device) -> bool:
    """Whether a device can run the kernel."""
    return device.type == "cuda" and available_methods(device, torch.bfloat16)["triton"] is None


def _launcher() -> Any:
    if not _made:
        from leet_linear_attention.triton.launcher import Launcher

        from .few_rows_kernel import few_rows_kernel

        _made.append(Launcher(few_rows_kernel))
    return _made[0]


_made: list[Any] = []
