"""Keeps the torch forms in the precision they promise, whatever the caller has switched on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def full_precision(
    function: Callable[Concatenate[Tensor, Rest], Result],
) -> Callable[Concatenate[Tensor, Rest], Result]:
    """Run `function` without autocast, TF32 or bf16 in products of float32; its first argument gives the device."""

    @functools.wraps(function)
    def inner(first: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        chosen = torch.get_float32_matmul_precision()
        device = first.device.type
        if chosen == "highest" and not torch.is_autocast_enabled(device):
            return function(first, *args, **kwargs)  # nothing to hold off: entering and leaving costs a short call dear
        with torch.autocast(device, enabled=False):
            if chosen == "highest":
                return function(first, *args, **kwargs)
            torch.set_float32_matmul_precision("highest")
            try:
                return function(first, *args, **kwargs)
            finally:
                torch.set_float32_matmul_precision(chosen)

    return inner
