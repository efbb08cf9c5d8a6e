"""The gate of experts of a mixture as one gated unit: autograd keeps gate and up, and nothing made of them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .expert_form import has_default_gate
from .glu import activation_name, gated

NAME = "_apply_gate"  # what transformers' implementations of experts call between the two projections


def apply_gate(self: Any, gate_up_out: Tensor) -> Tensor:
    """`act(gate) * up` of gate_up_out [S, 2 * inner], [gate | up]; replaces transformers' default on an instance."""
    activation = activation_name(self.act_fn)
    if activation is None:
        return type(self)._apply_gate(self, gate_up_out)
    gate, up = gate_up_out.chunk(2, dim=-1)
    return gated(gate, up, activation)


def gated_experts(base: nn.Module) -> list[nn.Module]:
    """The experts in a model whose gate is transformers' default, with an activation there is a kernel for."""
    return [module for module in base.modules() if _serves(module)]


def has_gate(module: nn.Module) -> bool:
    """Whether `apply_gate` is the gate of a module by `install_gate`."""
    return _is_ours(module.__dict__.get(NAME))


def install_gate(experts: nn.Module) -> None:
    """Make `apply_gate` the gate of a module of `gated_experts`."""
    experts.__dict__[NAME] = functools.partial(apply_gate, experts)


def restore_gate(module: nn.Module) -> None:
    """Undo `install_gate`; nothing happens to another module, nor to a gate that was set since."""
    if has_gate(module):
        del module.__dict__[NAME]


def _serves(module: nn.Module) -> bool:
    if not has_default_gate(module):
        return False
    given = module.__dict__.get(NAME)
    return (given is None or _is_ours(given)) and activation_name(getattr(module, "act_fn", None)) is not None


def _is_ours(gate: Any) -> bool:
    return isinstance(gate, functools.partial) and gate.func is apply_gate
