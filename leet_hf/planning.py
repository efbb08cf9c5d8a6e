"""What patching a model would do: which modules get which bindings. Checks everything, changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from leet_linear_attention import available_methods

from .adapters import Adapter, adapters
from .fused.expert_binding import ExpertsBinding, experts_of
from .fused.norms import NormBinding, norms_of
from .host import HostBinding
from .hosts.softmax import SoftmaxBinding
from .layer import LayerBinding
from .module import recurrent_modules
from .slots import foreign_forward, meta_tensor

Binding = LayerBinding | SoftmaxBinding | HostBinding | NormBinding | ExpertsBinding


class UnsupportedModelError(ValueError):
    """A model that can not be patched; the message says why and what is supported."""


@dataclass
class Host:
    """A base model found in a model, with all that patching will put on it and its layers."""

    name: str
    module: nn.Module
    binding: HostBinding
    layers: list[tuple[str, nn.Module, LayerBinding]]
    softmax: list[tuple[str, nn.Module, SoftmaxBinding]]
    fused: list[tuple[nn.Module, NormBinding | ExpertsBinding]]


def plan(model: nn.Module, method: str) -> list[Host]:
    """The base models in a model with what patching puts on them; bindings that are there stay.

    method: of layers that have none yet. Raises TypeError for what is no module, and UnsupportedModelError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    hosts = []
    for name, module in model.named_modules():
        known = module.__dict__.get("_leet")
        adapter = (
            known.adapter
            if isinstance(known, HostBinding)
            else next((a for a in adapters() if a.owns_base(module)), None)
        )
        if adapter is not None:
            host = _plan_host(name, module, adapter, method)
            if host is not None:
                _check_heads(model, host)
                hosts.append(host)
    if not hosts:
        raise UnsupportedModelError(_unsupported(model))
    return hosts


def _plan_host(name: str, base: nn.Module, adapter: Adapter, method: str) -> Host | None:
    found = [(path, module) for path, module in base.named_modules(prefix=name) if adapter.owns_layer(module)]
    if not found:
        return None
    host: HostBinding | None = base.__dict__.get("_leet")
    if host is not None and all("_leet" in module.__dict__ for _, module in found):
        layers = [(path, module, module.__dict__["_leet"]) for path, module in found]
        return Host(name, base, host, layers, _plan_softmax(name, base, adapter), _fused(base))
    for path, module in found:
        _check_module(path, module, adapter.misfit(module))
    _check_module(name or "model", base, adapter.base_misfit(base))
    places = {id(attention): place for place, (_, attention) in enumerate(adapter.attentions(base))}
    layers = []
    softmax = _plan_softmax(name, base, adapter)
    for path, module in found:
        place, index = places.get(id(module)), adapter.index(module)
        if place is None or index not in (None, place):
            raise UnsupportedModelError(
                f"{path} says it is layer {index} but is layer {place}: number the layers in their order, as caches do"
            )
        binding = module.__dict__.get("_leet") or _plan_layer(path, module, base, place, adapter, method)
        layers.append((path, module, binding))
    return Host(name, base, host or HostBinding(adapter, adapter.cache_spec(base)), layers, softmax, _fused(base))


def _fused(base: nn.Module) -> list[tuple[nn.Module, NormBinding | ExpertsBinding]]:
    return [*norms_of(base), *experts_of(base)]


def _plan_softmax(name: str, base: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module, SoftmaxBinding]]:
    """The softmax layers whose own forward knows only the host's own caches."""
    planned = []
    for place, (path, module) in enumerate(adapter.attentions(base)):
        if adapter.owns_softmax(module):
            path = f"{name}.{path}" if name else path
            if not is_patched(module):
                _check_module(path, module, None)
            planned.append((path, module, module.__dict__.get("_leet") or SoftmaxBinding(adapter, place)))
    return planned


def _plan_layer(
    path: str, layer: nn.Module, base: nn.Module, index: int, adapter: Adapter, method: str
) -> LayerBinding:
    lacking = meta_tensor(layer)
    if lacking is not None:
        raise UnsupportedModelError(f"{path}.{lacking} is on the meta device: load the weights first, then patch")
    try:
        decay = adapter.decay_within(base, layer)
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    return LayerBinding(adapter, index, decay, method)


def _check_heads(model: nn.Module, host: Host) -> None:
    """Before the forward of a model that generates is replaced: nobody else may have done so."""
    if "forward" in host.binding.adapter.head_methods:
        for name, head in heads(model, host.module):
            if not is_patched(head):
                _check_module(name or "model", head, None)


def heads(model: nn.Module, base: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models around a base model that generate."""
    # On the class: a PEFT wrapper passes attributes of the model inside on as its own.
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(type(module), "_prepare_cache_for_generation") and getattr(module, "base_model", None) is base
    ]


def _check_module(path: str, module: nn.Module, misfit: str | None) -> None:
    kind = type(module).__name__
    if misfit is not None:
        raise UnsupportedModelError(f"{path} is a {kind}, but {misfit}: the adapter was written for other code")
    foreign = foreign_forward(module)
    if foreign is not None:
        raise UnsupportedModelError(
            f"{path} ({kind}) has had its forward replaced already, by {foreign}: patch the model before that"
        )


def check_method(method: str) -> None:
    """Raise ValueError unless it is "auto" or names a method of the operator."""
    known = ["auto", *available_methods()]
    if method not in known:
        raise ValueError(f"method is {method!r}, must be one of {', '.join(map(repr, known))}")


def _unsupported(model: nn.Module) -> str:
    supported = "\n".join(f"  {a.name}: {a.layer_class} inside {a.base_class}" for a in adapters())
    stray = [(a, name) for a in adapters() for name, module in model.named_modules() if a.owns_layer(module)]
    if stray:
        adapter, name = stray[0]
        found = f"has {name or 'itself'}, a {adapter.layer_class}, without the {adapter.base_class}: pass that"
    elif recurrent_modules(model):
        found = "has DecayLinearAttention layers, which need no patching, and no layer that an adapter recognises"
    else:
        found = "has no linear-attention layer that an adapter recognises"
    return f"{type(model).__name__} {found}. Supported:\n{supported}"


def is_patched(module: nn.Module) -> bool:
    """Whether a module has a binding, by patching or since it was made."""
    return "_leet" in module.__dict__
