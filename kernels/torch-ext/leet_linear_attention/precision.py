"""Keeps the torch forms in the precision they promise, whatever the caller has switched on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def products_are_exact() -> bool:
    """Whether torch multiplies float32 as float32, and not in TF32 or bfloat16."""
    return _chosen() == "highest"


def full_precision(
    function: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Run `function` without autocast, TF32 or bf16 in products of float32; its first argument gives the device."""

    @functools.wraps(function)
    def inner(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        chosen = _chosen()
        device = first.device.type
        if chosen == "highest" and not torch.is_autocast_enabled(device):
            return function(first, *args, **kwargs)  # nothing to hold off: entering and leaving costs a short call dear
        with torch.autocast(device, enabled=False):
            if chosen == "highest":
                return function(first, *args, **kwargs)
            with _exact(chosen):
                return function(first, *args, **kwargs)

    return inner


def _chosen() -> str | None:
    """What torch.set_float32_matmul_precision was told; None where a backend was told something else since.

    Torch lets nobody ask for the one setting then, nor multiply while the two differ.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _exact(chosen: str | None) -> Iterator[None]:
    """float32 as float32 inside, by the one setting that was `chosen`, or by those of the backends; as it was after."""
    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    kept = [backend.fp32_precision for backend in backends]
    if chosen is not None:
        torch.set_float32_matmul_precision("highest")
    else:
        for backend in backends:
            backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if chosen is not None:
            torch.set_float32_matmul_precision(chosen)
        for backend, precision in zip(backends, kept, strict=True):
            backend.fp32_precision = precision
