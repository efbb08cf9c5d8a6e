"""What stands in the way of recorded decode steps: in a model, a cache, a forward; and what a recording depends on."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .cache import BUFFER, RecurrentLayer
from .growing import GrowingLayer
from .layer import LayerBinding
from .shapes import SoftmaxShape

MOST_TOKENS = BUFFER  # of one recorded step; more pay for their launches themselves
# Arguments of a base model's forward that a recorded step knows.
KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache", "return_dict",
    "logits_to_keep",
}  # fmt: skip
ATTENTIONS = ("sdpa", "eager")  # implementations whose masks a recorded step makes


def obstacle(model: Any, base: Any) -> str | None:
    """Why decode steps of a model can not be recorded as it is now, in words, or None. Changes nothing."""
    if os.environ.get("LEET_CHECK_VALUES") == "1":
        return "LEET_CHECK_VALUES=1 looks at values, which waits for the device"
    home = getattr(type(model).forward, "__module__", "")
    if not home.startswith(("transformers.", "leet_hf.")):
        return (
            f"{type(model).__name__} is code of {home.split('.')[0]}, which may not hand on what a recorded step needs"
        )
    if model.training:
        return "the model is in training mode"
    for flag in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if getattr(base.config, flag, False):
            return f"config.{flag} asks for more than a recorded step gives"
    if any(isinstance(shape, SoftmaxShape) for shape in base._leet.spec):
        attention = base.config._attn_implementation
        if attention not in ATTENTIONS:
            return f"softmax layers use {attention!r}: recorded steps make masks for {' and '.join(ATTENTIONS)}"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_compileable", False):
        return f"{type(quantizer).__name__} does not allow it"
    modules = [*base.named_modules()]  # once: a draft's generate() is called every few tokens
    return _module_obstacle(modules) or _tensor_obstacle(modules)


def _module_obstacle(modules: list[tuple[str, nn.Module]]) -> str | None:
    for name, module in modules:
        if (reason := _reason_in(module)) is not None:
            return f"{name or 'the base model'} {reason}"
    return None


def _reason_in(module: nn.Module) -> str | None:
    if "_hf_hook" in module.__dict__:
        return "has a hook of accelerate (device_map with several devices, or offloading)"
    if _is_adapter(type(module)):  # type: ignore[arg-type]  # classes have a hash
        return f"is an adapter's {type(module).__name__} (PEFT), which may change between calls"
    if module._compiled_call_impl is not None:
        return "is compiled"
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        # Transformers leaves hooks behind that do nothing unless outputs are recorded.
        if "output_capturing_hook" not in getattr(hook, "__qualname__", ""):
            return f"has a forward hook ({getattr(hook, '__qualname__', type(hook).__name__)})"
    return None


@functools.lru_cache(maxsize=256)
def _is_adapter(cls: type) -> bool:
    return any(base.__name__ == "BaseTunerLayer" for base in cls.__mro__)


def _tensor_obstacle(modules: list[tuple[str, nn.Module]]) -> str | None:
    devices = set()
    for name, module in modules:
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            if hasattr(parameter, "placements"):
                return f"{name}.{own} is sharded over processes"
            devices.add(parameter.device)
    if len(devices) != 1:
        return f"weights are on {len(devices)} devices"
    return None


def state_of(base: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a recording has built in: if it differs, recordings are void."""
    found: list[Any] = []
    for module in base.modules():
        own = module.__dict__
        found.append(id(own.get("forward")))
        if isinstance(binding := own.get("_leet"), LayerBinding):
            found.append(binding.method)
        for tensors in (module._parameters, module._buffers):
            found += [None if x is None else x.data_ptr() for x in tensors.values()]
    first = next(base.parameters())
    config: Any = base.config
    return (first.dtype, first.device, config._attn_implementation, getattr(config, "sliding_window", None), *found)


def cache_obstacle(cache: Any, spec: Any) -> str | None:
    """Why a cache can not be used with recorded steps."""
    if type(cache) is not DynamicCache:
        return f"the cache is a {type(cache).__name__}: recorded steps work on a DynamicCache"
    if cache.offloading:
        return "the cache is offloaded"
    if len(cache.layers) != len(spec):
        return f"{len(cache.layers)} of {len(spec)} layers run (early exit)"
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, GrowingLayer) and type(layer) not in (RecurrentLayer, DynamicLayer):
            return f"cache layer {index} is a {type(layer).__name__}"
    return None


def serves(base: Any, cache: Any, arguments: dict[str, Any], most: int = MOST_TOKENS) -> bool:
    """Whether a forward is one that steps are recorded for: a few tokens after others, nothing out of the ordinary."""
    ids, positions, mask = (arguments.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if ids is None or positions is None or cache is None or torch.is_grad_enabled() or base.training:
        return False
    tokens = ids.shape[1]
    if not 1 <= tokens <= most or positions.dim() != 2 or positions.shape[1] != tokens:
        return False
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return False
    if any(isinstance(value, torch.Tensor) or value for name, value in arguments.items() if name not in KNOWN):
        return False
    if arguments.get("return_dict") is False or torch.is_autocast_enabled(ids.device.type):
        return False
    return not (ids.is_cuda and torch.cuda.is_current_stream_capturing())


def fits(cache: Any, ids: torch.Tensor) -> bool:
    """Whether every layer of a cache holds tokens and takes these."""
    rows, tokens = ids.shape
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            state = layer.state
            if state is None or not layer.has_tokens or tokens > state.buffer:
                return False
            if state.base.shape[0] != rows or state.base.device != ids.device:
                return False
        elif not isinstance(layer, GrowingLayer) or layer.buffers is None:
            return False
    return True
