"""Which of the host's implementations of experts a recorded decode step uses: one that asks nothing of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Copies of the chosen experts' weights that "batched_mm" may make in a step.
MOST_COPIED = 64 << 20
# Loops over experts on the host, or picks kernels by what the device says.
_ASKING = (None, "eager", "grouped_mm", "batched_mm")


def recordable_experts(base: Any, tokens: int) -> tuple[str | None, str | None]:
    """(implementation to record a step of `tokens` tokens with, or None to leave it; why there is none, or None).

    "grouped_mm" reads each chosen expert's weights once and is one kernel for bfloat16 on GPUs of capability 9 and
    newer; elsewhere it waits for the device. "batched_mm" copies the weights of the experts each token chose: right for
    few tokens only.
    """
    weights = _weights(base)
    if not weights or getattr(base.config, "_experts_implementation", None) not in _ASKING:
        return None, None
    if all(_groups(weight) for weight in weights):
        return "grouped_mm", None
    copied = copied_experts(base, tokens)
    if copied <= MOST_COPIED:
        return "batched_mm", None
    return None, (
        f"a step of {tokens} tokens would copy {copied >> 20} MB of experts' weights a layer, and only bfloat16 on "
        "GPUs of capability 9 has experts in one kernel"
    )


def copied_experts(base: Any, tokens: int) -> int:
    """Bytes of weights that "batched_mm" copies at once in a step of `tokens` tokens."""
    chosen = tokens * int(getattr(base.config, "num_experts_per_tok", 1))
    return max((chosen * weight[0].numel() * weight.element_size() for weight in _weights(base)), default=0)


def _weights(base: nn.Module) -> list[torch.Tensor]:
    experts = (module for module in base.modules() if _is_experts(module))
    return [p for module in experts for p in module.parameters(recurse=False) if p.dim() == 3]


@contextmanager
def experts_set_to(base: Any, implementation: str | None) -> Iterator[None]:
    """The config's experts implementation changed inside, and put back."""
    if implementation is None:
        yield
        return
    kept = base.config._experts_implementation_internal
    base.config._experts_implementation_internal = implementation
    try:
        yield
    finally:
        base.config._experts_implementation_internal = kept


def _is_experts(module: nn.Module) -> bool:
    # What transformers' decorator `use_experts_implementation` leaves on a module.
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def _groups(weight: torch.Tensor) -> bool:
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:]) and weight.data_ptr() % 16 == 0
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and aligned
        and torch.cuda.get_device_capability(weight.device)[0] >= 9
    )
