"""Launching a compiled kernel again without Triton's inspection of every argument.

Triton looks at each argument of each launch to find the compiled kernel it needs: 60 us for the 39 of the sweep, more
than a short sequence takes on the device. What decides here is little, so it is looked up directly.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_INT32 = 2**31
# Of every compilation. Products and sums are fused: the default of Triton 3.10 is another, of which 3.9 warns.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


class _Overlap(threading.local):
    on = False


_overlap = _Overlap()


@contextmanager
def overlapping(device: torch.device) -> Iterator[None]:
    """Launches of this thread inside may begin before those in front of them have ended, where the device can that.

    Kernels then wait for that end themselves, by ``common.wait_for_inputs`` or what it is made of (CUDA programming
    guide, "Programmatic Dependent Launch"). It pays where many short launches follow each other, as in a decode step.
    """
    kept = _overlap.on
    _overlap.on = device.type == "cuda" and can_overlap(
        torch.cuda.current_device() if device.index is None else device.index
    )
    try:
        yield
    finally:
        _overlap.on = kept


@functools.cache
def can_overlap(device_index: int) -> bool:
    """Whether launches on a CUDA device can begin before those in front of them have ended; not in the interpreter."""
    if device_index < 0 or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device_index)[0] >= 9


def device_index(x: torch.Tensor) -> int:
    """CUDA device number, or -1 in Triton's interpreter on the CPU."""
    return x.device.index if x.is_cuda else -1


def aligned_strides(*tensors: torch.Tensor) -> tuple[int, list[int]]:
    """(A, strides of the first three dimensions over A): A elements are 16 bytes if every stride allows it, else 1."""
    strides = [s for x in tensors for s in x.stride()[:3]]
    align = 16 // tensors[0].element_size()
    if any(s % align for s in strides):
        return 1, strides
    return align, [s // align for s in strides]


class Launcher:
    """Launches one kernel whose parameters are, in this order, tensors, numbers and constants.

    Every number that is an integer must be in the kernel's ``do_not_specialize``: then a compilation depends on the
    constants, the options, the tensors' dtypes, on which of them are None, and on whether all of them begin at a
    multiple of 16 bytes and all integers fit 32 bits. Where the last two do not hold, Triton finds its way itself.

    overlaps: whether the kernel has one more constant, the last: whether it is launched inside `overlapping`.
    """

    def __init__(self, kernel: Any, overlaps: bool = False) -> None:
        self._kernel, self.overlaps = kernel, overlaps
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
        registers: int | None = None,
        early: bool = False,
    ) -> Any:
        """Launch a grid of one or two dimensions on a device's current stream; device -1: Triton's interpreter.

        registers: the most a thread may use; None leaves it to the compiler. early: as inside `overlapping`, of a
        kernel that waits by itself. Returns what `Launch` may call the next time, or None where Triton has to look at
        the arguments.
        """
        if device >= 0 and torch.cuda.current_device() != device:
            with torch.cuda.device(device):
                return self(grid, device, tensors, numbers, constants, warps, stages, registers, early)
        options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, **OPTIONS}
        if registers is not None:
            options["maxnreg"] = registers
        if self.overlaps:
            constants = (*constants, _overlap.on)
        if early or (self.overlaps and _overlap.on):
            options["launch_pdl"] = True
        if device < 0:
            self._kernel[grid](*tensors, *numbers, *constants, **options)
            return None
        # Addresses, which the launch takes as they are: of a tensor it would ask for more than that.
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        together = 0
        for address in addresses:
            together |= address
        usual = together % 16 == 0 and max(numbers) < _INT32
        key = (device, constants, warps, stages, registers, early, *[None if x is None else x.dtype for x in tensors])
        compiled = self._compiled.get(key) if usual else None
        if compiled is not None:
            blocks = (*grid, 1, 1)
            run = compiled[blocks]
            run(*addresses, *numbers, *constants)
            return run
        compiled = self._kernel[grid](*tensors, *numbers, *constants, **options)
        if usual:
            self._compiled[key] = compiled
        return None


class Launch:
    """A launch of which everything is known but the tensors' addresses: what is left to do takes a few microseconds.

    Its tensors have the same dtypes at every call, and the same ones of them are None.
    """

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, ...],
        device: int,
        numbers: tuple[float, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int,
        early: bool = False,
    ) -> None:
        self._launcher, self._grid, self._device = launcher, grid, device
        self._numbers, self._constants, self._options = numbers, constants, (warps, stages, None, early)
        self._rest = [(*numbers, *constants, *([overlap] if launcher.overlaps else [])) for overlap in (False, True)]
        self._runs: list[Any] = [None, None]  # outside `overlapping`, and inside

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        overlap = self._launcher.overlaps and _overlap.on
        run = self._runs[overlap]
        if run is not None and torch.cuda.current_device() == self._device:
            addresses = [0 if x is None else x.data_ptr() for x in tensors]
            together = 0
            for address in addresses:
                together |= address
            if together % 16 == 0:
                run(*addresses, *self._rest[overlap])
                return
        self._runs[overlap] = self._launcher(
            self._grid, self._device, tensors, self._numbers, self._constants, *self._options
        )
