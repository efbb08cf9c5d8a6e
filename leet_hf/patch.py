"""patch_model, unpatch_model and patch_report: replace the forward of modules of one model, and put it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from leet_linear_attention import available_methods

from .fused.expert_binding import ExpertsBinding, experts_forward
from .fused.expert_gate import gated_experts, has_gate, install_gate, restore_gate
from .fused.loss import has_loss
from .fused.norms import NormBinding, norm_forward
from .generation import GenerationBinding, RecurrentGeneration, install_generation, restore_generation
from .hosts.softmax import SoftmaxBinding
from .layer import LayerBinding
from .planning import Binding, Host, UnsupportedModelError, check_method, heads, is_patched, plan
from .report import LayerReport, PatchReport
from .slots import has_entry, install_forward, restore_forward

__all__ = ["UnsupportedModelError", "patch_model", "patch_report", "unpatch_model"]

Model = TypeVar("Model", bound=nn.Module)
# What modules of the host with nothing of a layer's own get, by their binding.
FORWARDS: dict[type, Callable[..., object]] = {NormBinding: norm_forward, ExpertsBinding: experts_forward}


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
    check_method(method)
    hosts = plan(model, method)
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
    for host in plan(model, "auto"):
        patched = is_patched(host.module)
        state = "patched: standard caches, packing" if patched else "not patched: call patch_model(model)"
        if _is_native(host.binding):
            state = "native: right as it is, nothing to patch"
        lines.append(f"{host.name or 'model'} ({type(host.module).__name__}): {state}")
        fused = [type(binding) for _, binding in host.fused]
        if norms := fused.count(NormBinding):
            lines.append(f"norms: {norms} {'fused' if patched else 'to be fused'} on CUDA")
        if experts := fused.count(ExpertsBinding):
            lines.append(
                f"experts: {experts} {'in' if patched else 'to be in'} fewer passes, for a token on a CPU, many on CUDA"
            )
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


# Applying and undoing.


def _apply(host: Host, model: nn.Module, undo: list[Callable[[], None]]) -> None:
    base, adapter = host.module, host.binding.adapter
    for _, module, binding in host.layers:
        if not is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, adapter.layer_forward, binding)
            weight = _weight(module)
            if weight is not None and weight.device.type != "meta":
                binding.log_decay(weight)  # made now, so that a graph traced before the first forward finds it
    for _, module, softmax in host.softmax:
        if not is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, softmax.forward, softmax)
    if not is_patched(base):
        undo.append(lambda: _restore(base))
        _install(base, adapter.base_forward, host.binding)
    for module, fused in host.fused:
        if not is_patched(module):
            undo.append(lambda module=module: _restore(module))  # type: ignore[misc]
            _install(module, FORWARDS[type(fused)], fused)
    for experts in gated_experts(base):
        if not has_gate(experts):
            undo.append(lambda experts=experts: restore_gate(experts))  # type: ignore[misc]
            install_gate(experts)
    for _, head in heads(model, base):
        if not is_patched(head):
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
