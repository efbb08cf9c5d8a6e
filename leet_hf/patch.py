"""patch_model, unpatch_model and patch_report: replace the forward of modules of one model, and put it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from leet_linear_attention import available_methods

from .adapters import Adapter, adapters
from .fused.expert_gate import gated_experts, has_gate, install_gate, restore_gate
from .fused.few_experts import ExpertsBinding, experts_forward, experts_of
from .fused.loss import has_loss
from .fused.norms import NormBinding, norm_forward, norms_of
from .generation import GenerationBinding, RecurrentGeneration, install_generation, restore_generation
from .host import HostBinding
from .hosts.softmax import SoftmaxBinding
from .layer import LayerBinding
from .module import recurrent_modules
from .report import LayerReport, PatchReport
from .slots import foreign_forward, has_entry, install_forward, meta_tensor, restore_forward

Model = TypeVar("Model", bound=nn.Module)
Binding = LayerBinding | SoftmaxBinding | HostBinding | NormBinding | ExpertsBinding
# What modules of the host with nothing of a layer's own get, by their binding.
FORWARDS: dict[type, Callable[..., object]] = {NormBinding: norm_forward, ExpertsBinding: experts_forward}


class UnsupportedModelError(ValueError):
    """A model that can not be patched; the message says why and what is supported."""


@dataclass
class _Host:
    """A base model found in a model, with all that patching will put on it and its layers."""

    name: str
    module: nn.Module
    binding: HostBinding
    layers: list[tuple[str, nn.Module, LayerBinding]]
    softmax: list[tuple[str, nn.Module, SoftmaxBinding]]
    fused: list[tuple[nn.Module, NormBinding | ExpertsBinding]]


def patch_model(model: Model, *, method: str = "auto", decode_graphs: bool = True) -> Model:
    """Make a model's linear-attention layers right and fast: recurrent cache, exact padding and packing, fp32 states.

    Replaces the forward of the recognised layers, of their base model, of its RMSNorms (one kernel on CUDA) and of its
    experts (for one token on a CPU) on this instance alone, lets its generate() use standard caches, and computes
    transformers' loss of causal language models, unless the model has another, in pieces. Parameters, buffers, config,
    class and everything `save_pretrained` writes stay as they are. Patching a patched model, or one of `leet_hf`'s own
    (RetNet), only sets `method` and `decode_graphs`.

    Args:
        model: a live model, or one that contains it (PEFT, say); before or after `.to()`, with or without device_map.
        method: of the operator: "auto", or a name from `leet_linear_attention.available_methods()`.
        decode_graphs: whether generate() may record its decode steps as CUDA graphs; `patch_report` says whether it
            does, and why not. The environment's LEET_DECODE_GRAPHS=0 turns them off too.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: no recognised layer, one that is not as expected, or one on the meta device.
        ValueError: an unknown method. After any exception the model is as it was.
    """
    _check_method(method)
    hosts = _plan(model, method)
    undo: list[Callable[[], None]] = []
    try:
        for host in hosts:
            _apply(host, model, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    for host in hosts:
        for _, _, binding in host.layers:
            binding.method = method
    for module in model.modules():
        generation = module.__dict__.get("_leet")
        if isinstance(generation, GenerationBinding):
            generation.decoding.enabled = bool(decode_graphs)
            if not decode_graphs:
                generation.decoding.forget()
    return model


def unpatch_model(model: Model) -> Model:
    """Put back everything `patch_model` replaced: the stock model, exactly. Nothing happens to one not patched.

    Nor to one of `leet_hf`'s own models, which is right without patching.
    """
    for module in model.modules():
        restore_gate(module)
        binding = module.__dict__.get("_leet")
        if isinstance(binding, Binding):
            if not _is_native(binding):
                _restore(module)
        elif isinstance(binding, GenerationBinding) and not isinstance(module, RecurrentGeneration):
            restore_generation(module)
    return model


def patch_report(model: nn.Module) -> PatchReport:
    """What was replaced, with which adapter, decay source and method, and why a layer was left alone.

    Of a model that is not patched, what `patch_model` would do. Raises UnsupportedModelError as it does.
    """
    lines, layers = [], []
    for host in _plan(model, "auto"):
        patched = _is_patched(host.module)
        state = "patched: standard caches, packing" if patched else "not patched: call patch_model(model)"
        if _is_native(host.binding):
            state = "native: right as it is, nothing to patch"
        lines.append(f"{host.name or 'model'} ({type(host.module).__name__}): {state}")
        fused = [type(binding) for _, binding in host.fused]
        if norms := fused.count(NormBinding):
            lines.append(f"norms: {norms} {'fused' if patched else 'to be fused'} on CUDA")
        if experts := fused.count(ExpertsBinding):
            lines.append(f"experts: {experts} {'without' if patched else 'to be without'} sorting a token on a CPU")
        gates = len(gated_experts(host.module))
        if gates:
            lines.append(f"experts: gates of {gates} {'fused' if patched else 'to be fused'} on CUDA")
        recurrent = {id(module): binding for _, module, binding in host.layers}
        adapted = {id(module) for _, module, _ in host.softmax}
        for index, (path, attention) in enumerate(host.binding.adapter.attentions(host.module)):
            path = f"{host.name}.{path}" if host.name else path
            if id(attention) in recurrent:
                layers.append(_layer_report(path, attention, recurrent[id(attention)], patched))
            else:
                reason = f"{type(attention).__name__} is no recurrent layer"
                if id(attention) in adapted:
                    reason += ", but is made to use standard caches"
                layers.append(LayerReport(path, index, "", "", "", "left alone", reason))
    for name, module in model.named_modules():
        binding = module.__dict__.get("_leet")
        if isinstance(binding, GenerationBinding):
            lines.append(f"{name or 'model'} ({type(module).__name__}): generate() prepares standard caches")
            lines.append(binding.decoding.describe(module, module.base_model))
            if has_loss(module):
                lines.append("loss: in pieces, no float32 copy of the logits")
    return PatchReport(tuple(layers), tuple(lines))


# Planning: checks everything, changes nothing.


def _plan(model: nn.Module, method: str) -> list[_Host]:
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


def _plan_host(name: str, base: nn.Module, adapter: Adapter, method: str) -> _Host | None:
    found = [(path, module) for path, module in base.named_modules(prefix=name) if adapter.owns_layer(module)]
    if not found:
        return None
    host: HostBinding | None = base.__dict__.get("_leet")
    if host is not None and all("_leet" in module.__dict__ for _, module in found):
        layers = [(path, module, module.__dict__["_leet"]) for path, module in found]
        return _Host(name, base, host, layers, _plan_softmax(name, base, adapter), _fused(base))
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
    return _Host(name, base, host or HostBinding(adapter, adapter.cache_spec(base)), layers, softmax, _fused(base))


def _fused(base: nn.Module) -> list[tuple[nn.Module, NormBinding | ExpertsBinding]]:
    return [*norms_of(base), *experts_of(base)]


def _plan_softmax(name: str, base: nn.Module, adapter: Adapter) -> list[tuple[str, nn.Module, SoftmaxBinding]]:
    """The softmax layers whose own forward knows only the host's own caches."""
    planned = []
    for place, (path, module) in enumerate(adapter.attentions(base)):
        if adapter.owns_softmax(module):
            path = f"{name}.{path}" if name else path
            if not _is_patched(module):
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


def _check_heads(model: nn.Module, host: _Host) -> None:
    """Before the forward of a model that generates is replaced: nobody else may have done so."""
    if "forward" in host.binding.adapter.head_methods:
        for name, head in _heads(model, host.module):
            if not _is_patched(head):
                _check_module(name or "model", head, None)


def _heads(model: nn.Module, base: nn.Module) -> list[tuple[str, nn.Module]]:
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


def _check_method(method: str) -> None:
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


# Applying and undoing.


def _apply(host: _Host, model: nn.Module, undo: list[Callable[[], None]]) -> None:
    base, adapter = host.module, host.binding.adapter
    for _, module, binding in host.layers:
        if not _is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, adapter.layer_forward, binding)
            weight = _weight(module)
            if weight is not None and weight.device.type != "meta":
                binding.log_decay(weight)  # made now, so that a graph traced before the first forward finds it
    for _, module, softmax in host.softmax:
        if not _is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, softmax.forward, softmax)
    if not _is_patched(base):
        undo.append(lambda: _restore(base))
        _install(base, adapter.base_forward, host.binding)
    for module, fused in host.fused:
        if not _is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, FORWARDS[type(fused)], fused)
    for experts in gated_experts(base):
        if not has_gate(experts):
            undo.append(lambda experts=experts: restore_gate(experts))  # type: ignore[misc]
            install_gate(experts)
    for _, head in _heads(model, base):
        if not _is_patched(head):
            undo.append(lambda head=head: restore_generation(head))  # type: ignore[misc]
            install_generation(head, host.binding)


def _install(module: nn.Module, function: Callable[..., object], binding: Binding) -> None:
    binding.had_entry = has_entry(module)
    module.__dict__["_leet"] = binding
    install_forward(module, function)


def _restore(module: nn.Module) -> None:
    binding = module.__dict__.pop("_leet", None)
    if isinstance(binding, SoftmaxBinding):
        restore_forward(module, binding.forward, binding.had_entry)
    elif isinstance(binding, NormBinding | ExpertsBinding):
        restore_forward(module, FORWARDS[type(binding)], binding.had_entry)
    elif binding is not None:
        adapter = binding.adapter
        function = adapter.layer_forward if isinstance(binding, LayerBinding) else adapter.base_forward
        restore_forward(module, function, binding.had_entry)


def _is_native(binding: Binding) -> bool:
    """Whether a module has had its binding since it was made, with a forward of its own."""
    return not isinstance(binding, NormBinding | ExpertsBinding) and getattr(binding.adapter, "native", False)


def _is_patched(module: nn.Module) -> bool:
    return "_leet" in module.__dict__


# Reporting.


def _layer_report(name: str, layer: nn.Module, binding: LayerBinding, patched: bool) -> LayerReport:
    status, reason = ("patched", "") if patched else ("not patched", "call patch_model(model)")
    decay = "per token" if binding.decay is None else binding.decay.source
    return LayerReport(name, binding.index, binding.adapter.name, decay, _method(layer, binding.method), status, reason)


def _method(layer: nn.Module, method: str) -> str:
    """What "auto" comes to where the layer's weights are now."""
    if method != "auto":
        return method
    weight = _weight(layer)
    where = () if weight is None else (weight.device, weight.dtype)
    serving = (name for name, refusal in available_methods(*where).items() if refusal is None)
    return f"auto ({next(serving, 'none can run here')})"


def _weight(layer: nn.Module) -> nn.Parameter | None:
    """A weight in the dtype the layer computes in; those of a quantized layer are integers."""
    return next((weight for weight in layer.parameters() if weight.is_floating_point()), None)
