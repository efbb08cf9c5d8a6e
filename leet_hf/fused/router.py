"""Routers of experts in a decode step: logits, softmax, the largest and their shares in one launch instead of seven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from leet_linear_attention.dispatch import available_methods

MOST_EXPERTS = 256
Routed = tuple[Tensor, Tensor, Tensor]


def formula(x: Tensor, weight: Tensor, top_k: int) -> Routed:
    """x [T, D] and weight [E, D] to logits [T, E], shares float32 [T, top_k] that sum to 1, and experts [T, top_k]."""
    logits = F.linear(x, weight)
    share, index = torch.topk(F.softmax(logits.float(), dim=-1), top_k, dim=-1)
    return logits, share / share.sum(dim=-1, keepdim=True), index


def routed(x: Tensor, weight: Tensor, top_k: int) -> Routed:
    """`formula` in one launch, without gradients; of equal logits the lower expert is chosen."""
    from leet_linear_attention.triton.launcher import device_index

    from .router_kernel import route_tokens  # imports triton

    x = x.contiguous()
    tokens, (experts, width) = x.shape[0], weight.shape
    logits = x.new_empty(tokens, experts)
    share = x.new_empty(tokens, top_k, dtype=torch.float32)
    index = x.new_empty(tokens, top_k, dtype=torch.int64)
    padded = max(2, 1 << (experts - 1).bit_length())
    step = max(32, 4096 // padded)
    route_tokens(
        (tokens,), device_index(x), (x, weight, logits, share, index), (experts,),
        (width, top_k, padded, step, max(2, 1 << (top_k - 1).bit_length())), 4, 1,
    )  # fmt: skip
    return logits, share, index


@contextmanager
def routers_in_one_launch(base: nn.Module) -> Iterator[None]:
    """The routers of a model that are the formula give `routed` inside, on a GPU."""
    found = [module for module in base.modules() if _is_router(module)]
    for module in found:
        module.__dict__["forward"] = functools.partial(_forward, module)
    try:
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


def _forward(self: Any, hidden_states: Tensor) -> Routed:
    return routed(hidden_states.reshape(-1, self.weight.shape[1]), self.weight, self.top_k)


def _is_router(module: nn.Module) -> bool:
    weight, top_k = module._parameters.get("weight"), module.__dict__.get("top_k")
    if weight is None or weight.dim() != 2 or not weight.is_cuda or not weight.is_contiguous():
        return False
    if not isinstance(top_k, int) or not 1 <= top_k <= weight.shape[0] <= MOST_EXPERTS:
        return False
    if len(module._parameters) != 1 or module._buffers or module._modules or "forward" in module.__dict__:
        return False
    return available_methods(weight.device, weight.dtype)["triton"] is None and is_formula(type(module).forward)


@functools.lru_cache(maxsize=64)
def is_formula(forward: Callable[..., Any]) -> bool:
    """Whether the forward of a class is `formula`, by a trial on a stand-in that has what such a router has."""
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        place = torch.arange(5 * 8 + 3 * 8, dtype=torch.float32, device="cpu")
        numbers = torch.sin(place * 1.7) * 3
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = numbers[:24].view(3, 8).to(dtype), numbers[24:].view(5, 8).to(dtype)
            stand_in = SimpleNamespace(weight=weight, top_k=2, num_experts=5, hidden_dim=8)
            try:
                got = forward(stand_in, x)
            except Exception:  # it needs more than such a router has, whatever it says about that
                return False
            if not isinstance(got, tuple) or len(got) != 3:
                return False
            for a, b in zip(got, formula(x, weight, 2), strict=True):
                if not isinstance(a, Tensor) or a.dtype != b.dtype or not torch.equal(a, b):
                    return False
    return True
