"""Experts modules of hosts: which ones get another forward, and what that leads to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..slots import foreign_forward
from . import few_experts, many_experts
from .expert_form import MOE, is_plain


@dataclass
class ExpertsBinding:
    """What patching puts on the experts of a mixture. had_entry: how to take the patch off again."""

    had_entry: bool = False


def experts_of(base: nn.Module) -> list[tuple[nn.Module, ExpertsBinding]]:
    """The experts in a model that have a binding or can have one; no others, nor those somebody replaced."""
    found = ((module, module.__dict__.get("_leet") or _binding(module)) for module in base.modules())
    return [(module, binding) for module, binding in found if isinstance(binding, ExpertsBinding)]


def _binding(module: nn.Module) -> ExpertsBinding | None:
    forward: Any = type(module).forward
    if getattr(forward, "__globals__", {}).get("__name__") != MOE or foreign_forward(module) is not None:
        return None
    return ExpertsBinding() if is_plain(module) else None


def experts_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the forward of experts: ours where it stands for what the host would do, else its class's own."""
    if len(args) == 3 and not kwargs and not torch.compiler.is_compiling():
        if few_experts.serves(self, *args):
            return few_experts.one_token(self, *args)
        if many_experts.serves(self, *args):
            return many_experts.many_tokens(self, *args)
    return type(self).forward(self, *args, **kwargs)
