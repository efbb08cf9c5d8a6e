"""Where a module's forward sits, and where its tensors are: plain modules, and modules with hooks of accelerate.

A forward is replaced on the instance. Accelerate does the same for its hooks: it keeps the forward it found as
`_old_forward` and calls it between its own steps. Ours goes below such a hook; a hook that comes later wraps ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn


def has_entry(module: nn.Module) -> bool:
    """Whether the slot of the module's forward is filled, which `restore_forward` has to know."""
    return _slot(module) in module.__dict__


def install_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make `function(module, ...)` the module's forward.

    A functools.partial: unlike a bound method, it survives pickling, and torch.compile traces it.
    """
    module.__dict__[_slot(module)] = functools.partial(function, module)


def restore_forward(module: nn.Module, function: Callable[..., Any], had_entry: bool) -> None:
    """Undo `install_forward`, wherever hooks have moved our forward meanwhile."""
    slot = _slot(module)
    if not _is_ours(module.__dict__.get(slot), function):
        return
    if slot == "_old_forward" or had_entry:
        module.__dict__[slot] = MethodType(type(module).forward, module)
    else:
        del module.__dict__[slot]
    outer = module.__dict__.get("forward")
    if _is_ours(getattr(outer, "__wrapped__", None), function):
        outer.__wrapped__ = module.__dict__[slot]  # type: ignore[union-attr]  # the hook's wrapper names what it wraps


def foreign_forward(module: nn.Module) -> str | None:
    """The name of what has replaced the module's forward other than a hook of accelerate, or None."""
    current = module.__dict__.get(_slot(module))
    if current is None or (isinstance(current, MethodType) and current.__func__ is type(module).forward):
        return None
    return getattr(current, "__qualname__", None) or repr(current)


def calls_only(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether calling the module is calling the function that `install_forward` put there, and nothing else."""
    return _is_ours(module.__dict__.get("forward"), function) and not _is_watched(module)


def calls_own(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward, and nothing else."""
    return "forward" not in module.__dict__ and not _is_watched(module)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks run around the module's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or nn.modules.module._has_any_global_hook()


def stored_tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module, from where accelerate keeps it if it is offloaded."""
    tensor: Tensor = getattr(module, name)
    if tensor.device.type == "meta":
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            return weights[name]
    return tensor


def meta_tensor(module: nn.Module) -> str | None:
    """The name of a parameter or buffer on the meta device that no hook of accelerate will fill in, or None."""
    for prefix, child in module.named_modules():
        if hasattr(child, "_hf_hook"):
            continue
        for name, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if tensor.device.type == "meta":
                return f"{prefix}.{name}" if prefix else name
    return None


def _slot(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook") else "forward"


def _is_ours(forward: Any, function: Callable[..., Any]) -> bool:
    return isinstance(forward, functools.partial) and forward.func is function
