"""Norm modules of hosts: which ones the kernel can stand for, the forward they get, and norms together with a gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..slots import calls_only, foreign_forward
from .norm import ACTIVATIONS, result_dtype, run, way_of
from .route import formula_only

# What a trial of a class's forward is made in: dtypes of the input and of the weight.
TRIALS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
)


@dataclass
class NormBinding:
    """What patching puts on an RMSNorm of a host.

    each: whether every step is rounded, as `leet_hf.fused.norm.rms_norm`. groups: into how many the last dim is cut,
    each with a mean of its own. had_entry: how to take the patch off again.
    """

    each: bool
    groups: int = 1
    had_entry: bool = False


def norm_binding(module: nn.Module) -> NormBinding | None:
    """A binding for a module that is an RMSNorm as models of Transformers have them, or None.

    That is: a `weight`, a `variance_epsilon`, perhaps a `group_norm_size`, and a forward of its class that needs
    nothing else of the module and gives, bit for bit, what the formula gives. Names of classes say nothing, and the
    decorator that declares a norm to Transformers leaves no trace where no hub kernels are installed.
    """
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
    groups = getattr(module, "group_norm_size", 1)
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or not isinstance(groups, int):
        return None
    if len(module._parameters) != 1 or module._buffers or module._modules or foreign_forward(module) is not None:
        return None
    if groups < 1 or weight.shape[0] % groups:
        return None
    each = _rounding(type(module).forward, "group_norm_size" in module.__dict__)
    return None if each is None else NormBinding(each, groups)


def norms_of(base: nn.Module) -> list[tuple[nn.Module, NormBinding]]:
    """The norms in a model that have a binding or can have one; others, or replaced by somebody else, are left out."""
    found = ((module, module.__dict__.get("_leet") or norm_binding(module)) for module in base.modules())
    return [(module, binding) for module, binding in found if isinstance(binding, NormBinding)]


@functools.lru_cache(maxsize=256)
def _rounding(forward: Callable[..., Any], grouped: bool) -> bool | None:
    """Whether the forward of a class rounds each step of the formula, or once; None if it is another formula."""
    groups = 2 if grouped else 1
    size, eps = 8 * groups, 0.37  # an eps that shows where it is added
    stand_in = SimpleNamespace(variance_epsilon=eps, **({"group_norm_size": groups} if grouped else {}))
    possible = [True, False]
    # Whatever surrounds the call of patch_model, the trial runs on the CPU as it is.
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        place = torch.arange(6 * size, dtype=torch.float32, device="cpu")
        x_wide = (torch.sin(place * 1.7) * torch.exp(torch.cos(place * 0.3) * 2)).view(2, 3, size)
        for x_dtype, weight_dtype in TRIALS:
            x = x_wide.to(x_dtype)
            stand_in.weight = (1 + 0.5 * torch.cos(place[:size])).to(weight_dtype)
            try:
                got = forward(stand_in, x)
            except Exception:  # it needs more than such a norm has, whatever it says about that
                return None
            wanted = [_run("torch", x, stand_in.weight, eps, NormBinding(each, groups)) for each in possible]
            possible = [
                each
                for each, want in zip(possible, wanted, strict=True)
                if isinstance(got, Tensor) and got.dtype == want.dtype and torch.equal(got, want)
            ]
    return possible[0] if possible else None


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Replaces the forward of an RMSNorm: the kernel on CUDA, its class's own forward or what equals it elsewhere."""
    weight, binding = self.weight, self._leet
    if formula_only("auto", hidden_states):
        if _one_call(hidden_states, weight, binding):
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
    elif (way := _way("auto", hidden_states, weight)) != "torch":
        return _run(way, hidden_states, weight, self.variance_epsilon, binding)
    return type(self).forward(self, hidden_states)


def _one_call(x: Tensor, weight: Tensor, binding: NormBinding) -> bool:
    """Whether torch's own norm on a CPU is the formula, step by step: in float32, where nothing is rounded between."""
    return (
        x.dtype == weight.dtype == torch.float32
        and binding.groups == 1
        and x.shape[-1:] == weight.shape
        and not torch.compiler.is_compiling()
    )


def gated_norm(norm: nn.Module, x: Tensor, gate: Tensor, activation: str, *, method: str = "auto") -> Tensor:
    """`act(gate) * norm(x)`, for x and gate [..., D], activation "sigmoid" or "silu".

    In one kernel where the norm has a binding and nothing would notice that it is not called: no hook, no forward
    besides ours, no weight that is not there. Otherwise just that. method: as `leet_hf.fused.norm.rms_norm`.
    """
    binding = None if formula_only(method, x) else norm.__dict__.get("_leet")
    if isinstance(binding, NormBinding) and calls_only(norm, norm_forward) and x.shape == gate.shape:
        weight: Any = norm.weight
        way = _way(method, x, weight, gate)
        if way != "torch":
            eps: Any = norm.variance_epsilon
            return _run(way, x, weight, eps, binding, gate, activation)
    return ACTIVATIONS[activation](gate) * norm(x)


def _way(method: str, x: Tensor, weight: Tensor, gate: Tensor | None = None) -> str:
    """As `way_of`; "torch" also where the weight is not for x's last dim: it is sharded, say."""
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        return "torch"
    return way_of(method, x.dtype, x, weight, gate)


def _run(
    way: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    binding: NormBinding,
    gate: Tensor | None = None,
    activation: str = "linear",
) -> Tensor:
    each, groups = binding.each, binding.groups
    # A norm that is rounded once gives x's dtype; what the gate makes of it is torch's rule again.
    dtype = result_dtype(x, weight if each else None, gate, True)
    if groups == 1:
        return run(way, x, weight, gate, eps, activation, each, dtype)
    x, weight = x.unflatten(-1, (groups, -1)), weight.unflatten(0, (groups, -1))
    gate = None if gate is None else gate.unflatten(-1, (groups, -1))
    return run(way, x, weight, gate, eps, activation, each, dtype).flatten(-2)
