"""Which way a fused function takes: its formula in torch, its kernel, or the operator that stands for the kernel."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from leet_linear_attention.interpreter import interpreting

# Looked up once, here, because torch.compile does not trace the looking up.
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETING = interpreting()
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def route(method: str, *tensors: Tensor) -> str:
    """ "torch", "kernel" or "operator", for tensors of one device, the first of the dtype that is computed.

    method: of the linear attention around: "torch" wants no kernels; "triton" wants them on a CPU too, in Triton's
    interpreter; any other name, as "auto", wants them on GPUs. Without Triton, in float64, for tensor subclasses and
    under functorch's transforms the formula in torch is taken, which these know how to treat.
    """
    x = tensors[0]
    kernels = x.device.type == "cuda" or (method == "triton" and _INTERPRETING and x.device.type == "cpu")
    if method == "torch" or not _TRITON or not kernels or x.dtype not in NARROW:
        return "torch"
    if torch.compiler.is_compiling():
        return "operator"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch"
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "torch"
    return "operator" if torch._C._len_torch_dispatch_stack() else "kernel"


def formula_only(method: str, x: Tensor) -> bool:
    """Whether `route` can only say "torch", whatever else there is: asking costs a short call on a CPU dear."""
    return x.is_cpu and method != "triton"


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to hear of a function of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
