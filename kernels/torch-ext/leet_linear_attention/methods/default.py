"""What every named algorithm takes from the default method: the operator's gradients and its decode step.

The gradient of the operator does not depend on how the forward was summed, and autograd through the Python loops of an
algorithm would keep an intermediate per token, channel or level. A decode step of one token is the recurrence whatever
the algorithm.
"""

from __future__ import annotations

from torch import Tensor

from .. import library
from ..dispatch import choose


def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients as `library.backward` gives them, by the method that "auto" takes for this device and dtype."""
    method = choose("auto", q.device, q.dtype)
    return library.backward(
        do, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, need_log_decay, False, method
    )  # fmt: skip


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    base: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decays: Tensor,
    cursor: Tensor,
    scale: float,
    buffer: int,
    keep: int,
) -> Tensor:
    """o of a decoding step as `library.step` gives it, by the method that "auto" takes for this device and dtype."""
    method = choose("auto", q.device, q.dtype)
    return library.step(
        q, k, v, log_decay, base, keys, values, log_decays, cursor, scale, buffer, keep, method
    )  # fmt: skip
