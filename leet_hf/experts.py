"""Which implementation of experts a recorded decode step uses: one that asks nothing of the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .fused import experts as fused
from .fused.many_experts import grouped_in_one_call

# Copies of the chosen experts' weights that "batched_mm" may make in a step.
MOST_COPIED = 64 << 20
# Loops over experts on the host, or picks kernels by what the device says.
_ASKING = (None, "eager", "grouped_mm", "batched_mm")


def recordable_experts(base: Any, tokens: int) -> tuple[list[str], str | None]:
    """(implementations a step of `tokens` tokens can be recorded with, the best first; why there is none, or None).

    None of both: there are no experts, or those set in the config can be recorded. "leet_hf" is two launches for few
    tokens. "grouped_mm" reads each chosen expert's weights once too, in about twenty launches, and only for bfloat16 on
    GPUs of capability 9 and newer without waiting for the device. "batched_mm" copies the weights of the experts each
    token chose: right for few tokens only.
    """
    experts = [module for module in base.modules() if _is_experts(module)]
    weights = _weights(experts)
    if not weights or getattr(base.config, "_experts_implementation", None) not in _ASKING:
        return [], None
    found = []
    lacking = next((reason for module in experts if (reason := fused.misfit(module, tokens)) is not None), None)
    if lacking is None:
        fused.register()
        found.append(fused.NAME)
    if all(grouped_in_one_call(weight) for weight in weights):
        found.append("grouped_mm")
    copied = _copied(base, weights, tokens)
    if copied <= MOST_COPIED:
        found.append("batched_mm")
    if found:
        return found, None
    return [], (
        f"a step of {tokens} tokens would copy {copied >> 20} MB of experts' weights a layer, only bfloat16 on GPUs "
        f"of capability 9 has experts in one kernel of torch, and leet_hf's own do not serve: {lacking}"
    )


def _copied(base: Any, weights: list[torch.Tensor], tokens: int) -> int:
    """Bytes of weights that "batched_mm" copies at once in a step of `tokens` tokens."""
    chosen = tokens * int(getattr(base.config, "num_experts_per_tok", 1))
    return max(chosen * weight[0].numel() * weight.element_size() for weight in weights)


def _weights(experts: list[nn.Module]) -> list[torch.Tensor]:
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
