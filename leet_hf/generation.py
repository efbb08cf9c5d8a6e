"""What generate() needs from a patched model: standard caches, with recurrent layers before the first forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Cache

from .cache import SLACK
from .host import HostBinding
from .shapes import CacheSpec
from .upgrade import recurrent_layers, upgrade


@dataclass
class GenerationBinding:
    """What patching puts on a model that generates."""

    spec: CacheSpec


def install_generation(model: nn.Module, spec: CacheSpec) -> None:
    """Let generate() of this instance prepare standard caches."""
    model.__dict__["_leet"] = GenerationBinding(spec)
    for name, function in _REPLACED.items():
        model.__dict__[name] = functools.partial(function, model)


def restore_generation(model: nn.Module) -> None:
    """Undo `install_generation`."""
    for name in ("_leet", *_REPLACED):
        model.__dict__.pop(name, None)


def upgrade_cache(cache: Any, model: nn.Module) -> Any:
    """Make a DynamicCache or StaticCache hold the recurrent layers of a patched model, and return it.

    A patched model does this itself at the first forward; this is for a cache that must be complete before, such as one
    whose prefill is compiled. Raises ValueError, with nothing changed, if the model is not patched or the cache is of
    another kind or model.
    """
    bindings = [module.__dict__.get("_leet") for module in model.modules()]
    hosts = [binding for binding in bindings if isinstance(binding, HostBinding)]
    if len(hosts) != 1:
        raise ValueError(f"model has {len(hosts)} patched base models, must have one: call patch_model(model) first")
    upgrade(cache, hosts[0].spec)
    return cache


def _supports_default_cache(model: Any) -> bool:
    return True


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Transformers' own preparation, then recurrent layers in the cache it made or was given."""
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if cache is None:
        return
    upgrade(cache, model._leet.spec, model.config.num_hidden_layers)
    # An assistant writes token by token and takes back its whole draft at once.
    assists = bool(getattr(generation_config, "is_assistant", False))
    drafted = getattr(model.generation_config, "num_assistant_tokens", None) if assists else None
    _set_recording(cache, int(drafted or 0), grows=assists)


def _candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own candidate generator; the cache learns how many candidates may be taken back at once."""
    generator = type(model)._get_candidate_generator(model, *args, **kwargs)
    cache = kwargs.get("model_kwargs", {}).get("past_key_values")
    if isinstance(cache, Cache):
        counts = (getattr(generator, name, 0) for name in ("num_assistant_tokens", "num_output_tokens"))
        _set_recording(cache, max(int(count or 0) for count in counts), grows=True)
    return generator


def _set_recording(cache: Any, candidates: int, *, grows: bool) -> None:
    for layer in recurrent_layers(cache):
        layer.record(candidates + SLACK, grows)


# Methods of the host that patching replaces on the instance.
_REPLACED: dict[str, Callable[..., Any]] = {
    "_supports_default_dynamic_cache": _supports_default_cache,
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_candidate_generator": _candidate_generator,
}
