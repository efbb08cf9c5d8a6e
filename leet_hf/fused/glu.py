"""Gated linear units: `act(gate) * up` in one kernel, and its gradients in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers.activations import GELUActivation, SiLUActivation

from .route import route, unit_last_stride, wants_gradient

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def activation_name(act: Any) -> str | None:
    """Which activation a module or function is: "silu", "gelu" (by the error function), or None for others."""
    if act is F.silu or type(act) in (nn.SiLU, SiLUActivation):
        return "silu"
    plain_gelu = type(act) is nn.GELU and act.approximate == "none"
    if act is F.gelu or plain_gelu or (type(act) is GELUActivation and act.act is F.gelu):
        return "gelu"
    return None


def gated(gate: Tensor, up: Tensor, activation: str, *, method: str = "auto") -> Tensor:
    """`act(gate) * up`, for gate and up [..., N] of one shape (Shazeer, "GLU Variants", arXiv 2002.05202).

    activation: "silu" or "gelu". method: as `leet_hf.fused.rotary.turned`. A kernel computes in float32, rounds
    once, and keeps gate and up for the gradients, nothing else. Raises ValueError for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(map(repr, ACTIVATIONS))}")
    way = route(method, gate, up)
    if way == "torch" or gate.dtype != up.dtype or gate.shape != up.shape or gate.dim() == 0:
        return ACTIVATIONS[activation](gate) * up
    gate, up = unit_last_stride(gate), unit_last_stride(up)
    if way == "operator":
        return torch.ops.leet_hf.gated(gate, up, activation)
    if wants_gradient(gate, up):
        return _Gated.apply(gate, up, activation)
    return by_kernel(gate, up, activation)


def by_kernel(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gated` by the kernel, without gradients; modes of torch functions can stand in for it, as for torch's own."""
    if has_torch_function_unary(gate):
        return handle_torch_function(by_kernel, (gate,), gate, up, activation)  # type: ignore[no-any-return]
    from .glu_kernel import gated  # imports triton

    return gated(gate, up, activation)


def _gated_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _gated_backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from .glu_kernel import gated_backward

    return gated_backward(dout, gate, up, activation)


def _gated_backward_fake(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # The context comes first: apart from it, autograd would look up the signature at every call.
        _setup_context(ctx, arguments, None)
        return by_kernel(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return *_gated_backward(unit_last_stride(dout), gate, up, ctx.activation), None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return *torch.ops.leet_hf.gated_backward(unit_last_stride(dout), gate, up, ctx.activation), None


def _twice(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("leet_hf::gated has no second derivative: use method='torch' to differentiate twice")


_library = torch.library.Library("leet_hf", "FRAGMENT")
_library.define("gated(Tensor gate, Tensor up, str activation) -> Tensor")
_library.define("gated_backward(Tensor dout, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)")
for _name, _function, _fake in (
    ("gated", by_kernel, _gated_fake),
    ("gated_backward", _gated_backward, _gated_backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leet_hf::{_name}", _fake, lib=_library)
torch.library.register_autograd("leet_hf::gated", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("leet_hf::gated_backward", _twice, lib=_library)
