"""What every named algorithm takes from the default method: the operator's gradients and its decode step.

The gradient of the operator does not depend on how the forward was summed, and autograd through the Python loops of an
algorithm would keep an intermediate per token, channel or level. A decode step of one token is the recurrence whatever
the algorithm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import library
from ..dispatch import choose


def backward(
    do: Tensor, dfinal: Tensor | None, q: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients as `library.backward` gives them, by the method that "auto" takes for this device and dtype.

    Arguments as there, without `batch_invariant`, which no named algorithm can promise, and `method`.
    """
    every: tuple[Any, ...] = (do, dfinal, q, *arguments, False, choose("auto", q.device, q.dtype))
    return library.backward(*every)


def step(q: Tensor, *arguments: Any) -> Tensor:
    """o of a decoding step as `library.step` gives it, its arguments without `method`, by what "auto" takes."""
    every: tuple[Any, ...] = (q, *arguments, choose("auto", q.device, q.dtype))
    return library.step(*every)
