"""The operator as ``torch.library`` operators: what torch.compile, CUDA graphs and autograd see.

    leet_linear_attention::forward    linear attention over a whole sequence, differentiable
    leet_linear_attention::backward   its gradients
    leet_linear_attention::step       one decoding step; mutates the decode state's tensors

Every operator has a fake implementation, so a compiled graph holds it as one node whatever the length.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .methods import NAMES
from .shapes import sequence_count, state_heads

_library = torch.library.Library("leet_linear_attention", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool output_final_state, bool batch_invariant, str method) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool need_log_decay, bool batch_invariant, str method) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) base, Tensor(b!) keys, Tensor(c!) values, "
    "Tensor(d!) log_decays, Tensor(e!) cursor, float scale, int buffer, int keep, str method) -> Tensor"
)

_MODULES = {
    ("torch", "forward"): "torch_chunked",
    ("torch", "backward"): "torch_chunked",
    ("torch", "step"): "torch_step",
    ("triton", "forward"): "triton.forward",
    ("triton", "backward"): "triton.backward",
    ("triton", "step"): "triton.step",
    **{(name, "forward"): f"methods.{name}" for name in NAMES},
    **{(name, other): "methods.default" for name in NAMES for other in ("backward", "step")},
}
_loaded: dict[tuple[str, str], Any] = {}


def _implementation(method: str, name: str) -> Any:
    """The function ``name`` of a method; its module is imported at first use, so torch alone never imports triton."""
    function = _loaded.get((method, name))
    if function is None:
        module: ModuleType = importlib.import_module("." + _MODULES[method, name], __package__)
        function = _loaded[method, name] = getattr(module, name)
    return function


def _invariance(batch_invariant: bool) -> dict[str, bool]:
    """The argument of methods that know the promise; `api` lets no other method give it."""
    return {"batch_invariant": True} if batch_invariant else {}


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    batch_invariant: bool,
    method: str,
) -> tuple[Tensor, Tensor | None]:
    """(o, final state if wanted): the forward of a method, past the dispatcher and without gradients."""
    return _implementation(method, "forward")(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state, **_invariance(batch_invariant)
    )  # fmt: skip


def _forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the operator of this name runs."""
    o, final = forward(q, *arguments)
    # An operator always returns both; a final state nobody asked for is empty.
    return o, final if final is not None else q.new_empty(0, dtype=_state_dtype(q))


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
    batch_invariant: bool,
    method: str,
) -> tuple[Tensor, Tensor]:
    heads = state_heads(q, k, v, log_decay, initial_state)
    o = q.new_empty(q.shape[0], q.shape[1], heads, v.shape[-1])
    shape = (sequence_count(q, cu_seqlens), heads, q.shape[-1], v.shape[-1]) if output_final_state else (0,)
    return o, q.new_empty(shape, dtype=_state_dtype(q))


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
    batch_invariant: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, of log_decay if needed and of initial_state if given; past the dispatcher."""
    return _implementation(method, "backward")(
        do, dfinal, q, k, v, log_decay, initial_state, cu_seqlens, scale, need_log_decay, **_invariance(batch_invariant)
    )  # fmt: skip


def _backward(do: Tensor, dfinal: Tensor | None, q: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What the operator of this name runs; empty tensors stand for None."""
    gradients = backward(do, dfinal, q, *arguments)
    return tuple(x if x is not None else q.new_empty(0, dtype=_state_dtype(q)) for x in gradients)


def _backward_fake(
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
    batch_invariant: bool,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _state_dtype(q)

    def like(x: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor:
        return q.new_empty(x.shape if x is not None and wanted else (0,), dtype=dtype)

    return (
        like(q, True, q.dtype),
        like(k, True, q.dtype),
        like(v, True, q.dtype),
        like(log_decay, need_log_decay, dtype),
        like(initial_state, True, dtype),
    )


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
    method: str,
) -> Tensor:
    """o of a decoding step; mutates base, keys, values, log_decays and cursor."""
    return _implementation(method, "step")(
        q, k, v, log_decay, base, keys, values, log_decays, cursor, scale, buffer, keep
    )


def _step_fake(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, base: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], base.shape[1], v.shape[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, log_decay, initial_state, cu_seqlens, scale, _, batch_invariant, method = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens)
    ctx.scale, ctx.batch_invariant, ctx.method = scale, batch_invariant, method


def _differentiate(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Any, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    need_log_decay = log_decay is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dlog_decay, dinitial = torch.ops.leet_linear_attention.backward(
        do, dfinal if dfinal is not None and dfinal.dim() == 4 else None, q, k, v,
        log_decay, initial_state, cu_seqlens, ctx.scale, need_log_decay, ctx.batch_invariant, ctx.method,
    )  # fmt: skip
    dlog_decay = dlog_decay if need_log_decay else None
    return dq, dk, dv, dlog_decay, dinitial if initial_state is not None else None, *[None] * 5


class Differentiable(torch.autograd.Function):
    """The differentiable operator for plain tensors: the same functions, half the dispatcher's time on the host."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        # The context comes first: apart from it, autograd would look up the signature at every call.
        ctx.set_materialize_grads(False)  # a final state without a gradient has None, not a tensor of zeros
        _setup_context(ctx, arguments, ())
        return forward(*arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        if do is None:
            heads = state_heads(q, k, v, log_decay, initial_state)
            do = q.new_zeros(q.shape[0], q.shape[1], heads, v.shape[-1])
        need_log_decay = log_decay is not None and ctx.needs_input_grad[3]
        gradients = backward(
            do,
            dfinal,
            q,
            k,
            v,
            log_decay,
            initial_state,
            cu_seqlens,
            ctx.scale,
            need_log_decay,
            ctx.batch_invariant,
            ctx.method,
        )
        return *gradients, *[None] * 5


for _name, _function, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("step", step, _step_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leet_linear_attention::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "leet_linear_attention::forward", _differentiate, setup_context=_setup_context, lib=_library
)
