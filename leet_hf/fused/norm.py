"""RMSNorm over the last dim, with a weight and a gate, in one kernel, and its gradients in one and a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .route import NARROW, route, wants_gradient

ACTIVATIONS = {"linear": lambda x: x, "sigmoid": torch.sigmoid, "silu": F.silu}
# What configs call them.
GATE_NAMES = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid", None: "linear"}
MOST = 16384  # columns of a program


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    gate: Tensor | None = None,
    activation: str = "linear",
    each: bool = True,
    dtype: torch.dtype | None = None,
    method: str = "auto",
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight * act(gate)` over the last dim (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [..., D], any strides; float32, bfloat16, float16 (float64 by torch).
        weight: None, [D], or [G, D] for x [..., G, D]: one a group.
        gate: None or x's shape: what the activation is taken of. activation: "linear", "sigmoid" or "silu".
        each: whether every step is rounded to its dtype, as models of Transformers do: the norm to x's, its product
            with the weight, the activation, and their product. Otherwise all is float32 and rounded once.
        dtype: of the result; default what torch promotes x, weight and gate to if `each`, else x's.
        method: of the linear attention around, which says whether kernels are wanted (`leet_hf.fused.route`).

    Returns x's shape, contiguous where a kernel made it. Gradients of x, weight and gate are computed in float32 and
    rounded once; only the arguments are kept for them. Raises ValueError for shapes that do not fit and an unknown
    activation. There is no second derivative but with method="torch": asking for one raises RuntimeError.
    """
    _check(x, weight, gate, activation)
    dtype = result_dtype(x, weight, gate, each) if dtype is None else dtype
    return run(way_of(method, dtype, x, weight, gate), x, weight, gate, eps, activation, each, dtype)


def run(
    way: str,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    activation: str,
    each: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`rms_norm` of arguments that fit, the way that `way_of` gave for them."""
    if way == "torch":
        return _by_formula(x, weight, gate, eps, activation, each, dtype)
    if way == "operator":
        return torch.ops.leet_hf.rms_norm(x, weight, gate, eps, activation, each, dtype)
    if wants_gradient(*[t for t in (x, weight, gate) if t is not None]):
        return _Normed.apply(x, weight, gate, eps, activation, each, dtype)
    return by_kernel(x, weight, gate, eps, activation, each, dtype)


def way_of(method: str, dtype: torch.dtype, x: Tensor, *others: Tensor | None) -> str:
    """As `leet_hf.fused.route`, for `rms_norm` of these tensors to this dtype: the kernels do not take everything."""
    if x.shape[-1] > MOST or dtype not in NARROW:
        return "torch"
    there = [t for t in others if t is not None]
    for t in there:
        if t.dtype not in NARROW or t.device != x.device:
            return "torch"
    return route(method, x, *there)


def result_dtype(x: Tensor, weight: Tensor | None, gate: Tensor | None, each: bool) -> torch.dtype:
    """The dtype of the result where none is asked for."""
    dtype = x.dtype
    for other in (weight, gate) if each else ():
        dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    return dtype


def _check(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, must be one of {', '.join(map(repr, ACTIVATIONS))}")
    if x.dim() == 0:
        raise ValueError("x is a scalar, must be [..., D]: give it the dim to take the mean over")
    if weight is not None and (weight.dim() not in (1, 2) or weight.shape != x.shape[-weight.dim() :]):
        raise ValueError(
            f"weight has shape {list(weight.shape)}, must be the last dim, or the last two, of x, {list(x.shape)}"
        )
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate has shape {list(gate.shape)}, must be x's, {list(x.shape)}: give one gate an entry")


def _by_formula(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str, each: bool, dtype: torch.dtype
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    act = ACTIVATIONS[activation]
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if each:
        normed = normed.to(x.dtype)
        normed = normed if weight is None else weight * normed
        return (normed if gate is None else act(gate) * normed).to(dtype)
    normed = normed if weight is None else normed * weight.to(wide)
    return (normed if gate is None else normed * act(gate.to(wide))).to(dtype)


def by_kernel(x: Tensor, *arguments: Any) -> Tensor:
    """`run` by the kernel, without gradients; modes of torch functions can stand in for it, as for torch's own."""
    if has_torch_function_unary(x):
        return handle_torch_function(by_kernel, (x,), x, *arguments)  # type: ignore[no-any-return]
    from .norm_kernel import norm  # imports triton

    return norm(x, *arguments)


def of_sum(
    x: Tensor, other: Tensor, weight: Tensor | None, eps: float, each: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x + other, its norm) by one kernel, without gradients: contiguous x and other of one shape and dtype."""
    from .norm_kernel import norm_of_sum

    return norm_of_sum(x, other, weight, eps, each, dtype)


def _norm_fake(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, activation: str, each: bool, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from .norm_kernel import norm_backward

    return norm_backward(*arguments)


def _backward_operator(dout: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator of this name runs; empty tensors stand for None."""
    dx, dweight, dgate = _backward(dout, *arguments)
    return dx, *(dout.new_empty(0) if g is None else g for g in (dweight, dgate))  # type: ignore[return-value]


def _backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None,
    eps: float, activation: str, each: bool, need_weight: bool, need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wanted = ((weight, need_weight), (gate, need_gate))
    dweight, dgate = (dout.new_empty(0) if t is None or not need else t.new_empty(t.shape) for t, need in wanted)
    return x.new_empty(x.shape), dweight, dgate


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, gate, *ctx.settings, _ = inputs
    ctx.save_for_backward(x, weight, gate)


def _needs(ctx: Any) -> tuple[bool, bool]:
    """Whether gradients of weight and gate are needed: a frozen weight costs nothing."""
    return ctx.needs_input_grad[1], ctx.needs_input_grad[2]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        # The context comes first: apart from it, autograd would look up the signature at every call.
        _setup_context(ctx, arguments, None)
        return by_kernel(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return *_backward(dout, *ctx.saved_tensors, *ctx.settings, *_needs(ctx)), *[None] * 4


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    needed = _needs(ctx)
    dx, *rest = torch.ops.leet_hf.rms_norm_backward(dout, *ctx.saved_tensors, *ctx.settings, *needed)
    return dx, *(g if need else None for g, need in zip(rest, needed, strict=True)), *[None] * 4


def _twice(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("leet_hf::rms_norm has no second derivative: use method='torch' to differentiate twice")


_library = torch.library.Library("leet_hf", "FRAGMENT")
_library.define(
    "rms_norm(Tensor x, Tensor? weight, Tensor? gate, float eps, str activation, bool each, ScalarType dtype) -> Tensor"
)
_library.define(
    "rms_norm_backward(Tensor dout, Tensor x, Tensor? weight, Tensor? gate, float eps, str activation, bool each, "
    "bool need_weight, bool need_gate) -> (Tensor, Tensor, Tensor)"
)
for _name, _function, _fake in (
    ("rms_norm", by_kernel, _norm_fake),
    ("rms_norm_backward", _backward_operator, _backward_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leet_hf::{_name}", _fake, lib=_library)
torch.library.register_autograd("leet_hf::rms_norm", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("leet_hf::rms_norm_backward", _twice, lib=_library)
