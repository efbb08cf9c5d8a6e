"""Launching a compiled kernel again without Triton's inspection of every argument.

Triton looks at each argument of each launch to find the compiled kernel it needs: 60 us for the 39 of the sweep, more
than a short sequence takes on the device. What decides here is little, so it is looked up directly.
"""

from __future__ import annotations

from typing import Any

import torch

_INT32 = 2**31


def device_index(x: torch.Tensor) -> int:
    """CUDA device number, or -1 in Triton's interpreter on the CPU."""
    return x.device.index if x.is_cuda else -1


class Launcher:
    """Launches one kernel whose parameters are, in this order, tensors, numbers and constants.

    Every number that is an integer must be in the kernel's ``do_not_specialize``: then a compilation depends on the
    constants, the options, the tensors' dtypes, on which of them are None, and on whether all of them begin at a
    multiple of 16 bytes and all integers fit 32 bits. Where the last two do not hold, Triton finds its way itself.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        device: int,
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int,
    ) -> None:
        """Launch a grid of one or two dimensions on a device's current stream; device -1: Triton's interpreter."""
        if device < 0:
            self._first(grid, tensors, numbers, constants, warps, stages)
            return
        begins = 0
        dtypes: list[torch.dtype | None] = []
        for x in tensors:
            if x is None:
                dtypes.append(None)
            else:
                begins |= x.data_ptr()
                dtypes.append(x.dtype)
        usual = begins % 16 == 0 and max(numbers) < _INT32
        key = (device, constants, warps, stages, *dtypes)
        compiled = self._compiled.get(key) if usual else None
        if torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                self(grid, device, tensors, numbers, constants, warps, stages)
        elif compiled is not None:
            blocks = (*grid, 1, 1)
            compiled[blocks](*tensors, *numbers, *constants)
        else:
            compiled = self._first(grid, tensors, numbers, constants, warps, stages)
            if usual:
                self._compiled[key] = compiled

    def _first(
        self,
        grid: tuple[int, ...],
        tensors: tuple[torch.Tensor | None, ...],
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int,
    ) -> Any:
        launch = self._kernel[grid]
        return launch(*tensors, *numbers, *constants, num_warps=warps, num_stages=stages)
