"""What generate() needs from a patched model: standard caches, with recurrent layers before the first forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import Cache, GenerationMixin

from .ahead import PASS, decides_as_transformers, going_ahead, is_ours, let_go_ahead
from .cache import SLACK
from .decoding import Decoding
from .draft import unheld
from .fused.loss import install_loss, restore_loss
from .host import HostBinding, masks_by_kind
from .hosts.remote import kinds_of
from .lookup import searching_on_the_host
from .module import recurrent_modules
from .rounds import in_rounds
from .shapes import CacheSpec
from .slots import has_entry, install_forward, restore_forward
from .upgrade import layers_counted, recurrent_layers, upgrade, upgrade_layer
from .versions import CACHE

PREPARE = "prepare_inputs_for_generation"
PAST = "leet_past"  # the keyword by which it learns what to leave out


@dataclass
class GenerationBinding:
    """What patching puts on a model that generates. replaced: the names of what it has of its own besides.

    forward: what replaces the model's own, if anything does; had_entry: how to take it off again. decoding: the model's
    recorded decode steps.
    """

    spec: CacheSpec
    replaced: tuple[str, ...]
    forward: Callable[..., Any] | None = None
    had_entry: bool = False
    decoding: Decoding = field(default_factory=Decoding)


def install_generation(model: nn.Module, host: HostBinding) -> None:
    """Let generate() of this instance prepare standard caches. host: the binding of its base model."""
    methods = {**_REPLACED, **host.adapter.head_methods}
    if getattr(model.config, "layer_types", None) is None:
        methods["create_masks_for_generate"] = _masks_for_generate
    if methods.get(PREPARE, getattr(type(model), PREPARE, None)) is GenerationMixin.prepare_inputs_for_generation:
        methods[PREPARE] = _prepare_inputs
    forward = methods.pop("forward", None)
    entries: dict[str, Any] = {name: functools.partial(function, model) for name, function in methods.items()}
    if getattr(model, "_is_stateful", False):
        entries["_is_stateful"] = False  # it says that tokens can not be taken back, which our layers can
    model.__dict__["_leet"] = GenerationBinding(host.spec, tuple(entries), forward, has_entry(model))
    model.__dict__.update(entries)
    install_loss(model)
    if forward is not None:
        install_forward(model, forward)


def restore_generation(model: nn.Module) -> None:
    """Undo `install_generation`."""
    binding = model.__dict__.pop("_leet", None)
    for name in binding.replaced if binding is not None else ():
        model.__dict__.pop(name, None)
    if binding is not None:
        restore_loss(model)
    if binding is not None and binding.forward is not None:
        restore_forward(model, binding.forward, binding.had_entry)


def upgrade_cache(cache: Any, model: nn.Module) -> Any:
    """Make a DynamicCache or StaticCache hold the recurrent layers of a model, and return it.

    model: patched, or with `DecayLinearAttention` layers. Such models do this themselves at the first forward; this is
    for a cache that must be complete before, such as one whose prefill is compiled. Raises ValueError if the model has
    no recurrent layers or the cache is of another kind or model; nothing is changed then.
    """
    own = recurrent_modules(model)
    if own:
        for module in own:
            upgrade_layer(cache, module.layer_idx, module.cache_shape, 0)
        return cache
    upgrade(cache, patched_base(model)[1].spec)
    return cache


def patched_base(model: nn.Module) -> tuple[Any, HostBinding]:
    """The one patched base model within a model, and its binding. Raises ValueError if there is none, or several."""
    found = [(module, module.__dict__.get("_leet")) for module in model.modules()]
    hosts = [(module, binding) for module, binding in found if isinstance(binding, HostBinding)]
    if len(hosts) != 1:
        raise ValueError(f"model has {len(hosts)} patched base models, must have one: call patch_model(model) first")
    return hosts[0]


def _supports_default_cache(model: Any) -> bool:
    return True


def _as_transformers_prepare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Declare that a function prepares inputs as transformers' method, whose signature generate() looks at."""
    function.__signature__ = inspect.signature(GenerationMixin.prepare_inputs_for_generation)  # type: ignore[attr-defined]
    return decides_as_transformers(function)


class RecurrentGeneration:
    """A base of model classes that need no patching, before GenerationMixin: what `install_generation` does to one."""

    _leet: GenerationBinding

    @_as_transformers_prepare
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return _prepare_inputs(self, *args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        _complete_cache(self, generation_config, model_kwargs, *args, **kwargs)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)  # type: ignore[misc]
        return going_ahead(criteria, generation_config)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return _generator(self, super()._get_candidate_generator, *args, **kwargs)  # type: ignore[misc]


@_as_transformers_prepare
def _prepare_inputs(
    model: Any, input_ids: Any, next_sequence_length: int | None = None, is_first_iteration: bool = False, **kwargs: Any
) -> Any:
    """Transformers' own, without the tokens that `_note_past` found in the cache already."""
    past = kwargs.pop(PAST, 0)
    if past and is_first_iteration and next_sequence_length is None:
        next_sequence_length = input_ids.shape[1] - past
    return GenerationMixin.prepare_inputs_for_generation(
        model, input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
    )


def _note_past(model: Any, arguments: dict[str, Any]) -> None:
    """Note for `_prepare_inputs` how much of a text the cache of assisted decoding holds.

    Transformers' loop for that gives the model the whole text at first, as none of the others does, and so twice what
    an earlier call has left in the cache. arguments: those that the loop asks for a candidate generator with.
    """
    own, ids, config = (arguments.get(name) for name in ("model_kwargs", "input_ids", "generation_config"))
    if own is None or ids is None or own.get("inputs_embeds") is not None or not isinstance(own.get(CACHE), Cache):
        return
    if not is_ours(model, PREPARE):
        return
    mask = own.get("attention_mask")  # a mask that hides nothing is left out by newer versions, which note its length
    whole = mask.shape[1] if mask is not None else getattr(config, "_mask_length", ids.shape[1])
    past = int(own[CACHE].get_seq_length())
    if 0 < past < ids.shape[1] == whole:
        own[PAST] = past


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Transformers' own preparation, then recurrent layers in the cache it made or was given."""
    with layers_counted(model.config, len(model._leet.spec)):
        type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    _complete_cache(model, generation_config, model_kwargs, *args, **kwargs)


def _criteria(model: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
    criteria = type(model)._get_stopping_criteria(model, generation_config, *args, **kwargs)
    return going_ahead(criteria, generation_config)


def _complete_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any],
    generation_mode: Any, batch_size: int, max_cache_length: int,
) -> None:  # fmt: skip
    cache = model_kwargs.get(CACHE)
    if cache is None:
        return
    upgrade(cache, model._leet.spec, getattr(model.config, "num_hidden_layers", None))
    # An assistant writes token by token and takes back its whole draft at once.
    assists = bool(getattr(generation_config, "is_assistant", False))
    drafted = getattr(model.generation_config, "num_assistant_tokens", None) if assists else None
    if assists:
        # Transformers has said so to the layers there were; those of a config without layer_types do not take note.
        for layer in recurrent_layers(cache):
            if not layer.record_past:
                layer.activate_past_recording()
    _set_recording(cache, int(drafted or 0), grows=assists)
    mask = model_kwargs.get("attention_mask")
    granted = model._leet.decoding.admit(model, model.base_model, cache, mask)
    if granted is not None:
        model_kwargs[PASS] = granted
        let_go_ahead(granted, model, generation_config, generation_mode, max_cache_length)


def _masks_for_generate(model: Any, **kwargs: Any) -> Any:
    """Masks by kind of layer, for a static cache: transformers asks the config for the kinds, this host's has none."""
    kinds = kinds_of(model._leet.spec, len(model._leet.spec))
    cache, positions = kwargs.get(CACHE), kwargs.get("position_ids")
    mask = kwargs["attention_mask"]
    return masks_by_kind(kwargs["config"], kwargs["inputs_embeds"], mask, cache, positions, None, set(kinds))


def _candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    return _generator(model, functools.partial(type(model)._get_candidate_generator, model), *args, **kwargs)


def _generator(model: Any, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Transformers' own candidate generator; the cache learns how many candidates may be taken back at once."""
    own = _without_pass(kwargs)
    generator = _expected(make(*args, **own), own)
    if not hasattr(model.config, "num_hidden_layers"):  # early exit lowers it for the draft, and puts it back
        generator.get_candidates = functools.partial(_counted, model, unheld(generator, "get_candidates"))
    in_rounds(generator, model, kwargs)
    _note_past(model, kwargs)
    return generator


def _counted(model: Any, get_candidates: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with layers_counted(model.config, len(model._leet.spec)):
        return get_candidates(*args, **kwargs)


def _without_pass(arguments: dict[str, Any]) -> dict[str, Any]:
    """A draft gets the model's arguments: all but the right to recorded steps, which is the model's own."""
    given = arguments.get("model_kwargs", {})
    if PASS not in given:
        return arguments
    return arguments | {"model_kwargs": {name: value for name, value in given.items() if name != PASS}}


def _expected(generator: Any, arguments: dict[str, Any]) -> Any:
    cache = arguments.get("model_kwargs", {}).get(CACHE)
    if isinstance(cache, Cache):
        counts = (getattr(generator, name, 0) for name in ("num_assistant_tokens", "num_output_tokens"))
        _set_recording(cache, max(int(count or 0) for count in counts), grows=True)
    return searching_on_the_host(generator)


def _set_recording(cache: Any, candidates: int, *, grows: bool) -> None:
    for layer in recurrent_layers(cache):
        layer.record(candidates + SLACK, grows)


# Methods of the host that patching replaces on the instance.
_REPLACED: dict[str, Callable[..., Any]] = {
    "_supports_default_dynamic_cache": _supports_default_cache,
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_candidate_generator": _candidate_generator,
    "_get_stopping_criteria": _criteria,
}
