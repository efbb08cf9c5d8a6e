"""Products with 1, as residual factors of models mostly are: no launch for what changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Spared(TorchFunctionMode):
    """Inside it, a floating-point tensor times the number 1 is that tensor itself, no copy.

    For decode steps, where nothing but caches and inputs is changed in place.
    """

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.mul and not kwargs:
            x, factor = args
            if type(x) is Tensor and type(factor) in (int, float) and factor == 1 and x.is_floating_point():
                return x
        return function(*args, **(kwargs or {}))
