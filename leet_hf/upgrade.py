"""Putting recurrent layers into a standard cache, and refusing a cache that is not this model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
)

from .cache import RecurrentLayer
from .shapes import CacheSpec, RecurrentShape, SoftmaxShape
from .static_cache import StaticRecurrentLayer
from .versions import CACHE

START_ANEW = f"pass no {CACHE}, or a fresh DynamicCache(config=model.config)"


def upgrade(cache: Any, spec: CacheSpec, layers_used: int | None = None) -> None:
    """Make a DynamicCache or StaticCache hold the recurrent layers of a model. Does nothing to one that does.

    spec: of the model. layers_used: how many of its layers run, where fewer (early exit); default all.

    Raises ValueError, with nothing changed, if the cache is of another kind or of another model.
    """
    layers = getattr(cache, "layers", None)
    if layers is not None and len(layers) == len(spec) and _fits(layers, spec):
        return
    _check_kind(cache)
    static = isinstance(cache, StaticCache) or any(isinstance(layer, StaticLayer) for layer in cache.layers)
    layers = _completed(cache, spec, len(spec) if layers_used is None else layers_used)
    if layers_used is not None and not any(_in_use(layer) for layer in layers[layers_used:]):
        # early exit: transformers crops every layer there is, some versions also those that never saw a token
        layers = layers[:layers_used]
    if not _fits(layers, spec):
        new = [_layer_for(spec, i, layers, static) for i in range(len(layers))]
        _check_lengths(new)
        layers = new
    _replace_layers(cache, layers)


def _replace_layers(cache: Any, layers: list[Any]) -> None:
    cache.layers = layers
    if cache.offloading and sum(not isinstance(layer, RecurrentLayer) for layer in layers) == 1:
        # Offloading fetches the next softmax layer during the use of this one. A lone layer is its own next: it would
        # be read while it is still being copied, so it stays on the device.
        cache.offloading = False


def upgrade_layer(cache: Any, index: int, shape: RecurrentShape, tokens: int) -> RecurrentLayer:
    """The recurrent layer of a DynamicCache or StaticCache at `index`, put there in the place of one without tokens.

    For one layer of a model whose other layers are not known. tokens: how many the layers before it may hold already,
    of the forward that is going on. Raises ValueError, with nothing changed, if the cache is of another kind or model.
    """
    _check_kind(cache)
    layers, make = list(cache.layers), cache.layer_class_to_replicate
    if make is not None:
        layers += [make() for _ in range(len(layers), index + 1)]
    if index >= len(layers):
        _refuse(f"has {len(layers)} layers but the model has a layer {index}")
    found = layers[index]
    if isinstance(found, RecurrentLayer) and found.shape == shape:
        return found
    for place, layer in enumerate(layers):
        counts = isinstance(layer, RecurrentLayer) or not isinstance(layer, LinearAttentionCacheLayerMixin)
        held = layer.get_seq_length() if counts else 0
        if place != index and int(held) > (tokens if place < index else 0):
            _refuse(f"is of another model: its layer {place} holds {held} tokens that layer {index} has not seen")
    static = isinstance(cache, StaticCache) or any(isinstance(layer, StaticLayer) for layer in layers)
    spec: CacheSpec = (*(SoftmaxShape(0, 0),) * index, shape)  # only its own place is looked at
    layers[index] = _layer_for(spec, index, layers, static)
    _replace_layers(cache, layers)
    return layers[index]


@contextmanager
def layers_counted(config: Any, layers: int) -> Iterator[None]:
    """A config that says how many layers there are by transformers' name, which that of some remote code does not."""
    if hasattr(config, "num_hidden_layers"):
        yield
        return
    config.num_hidden_layers = layers
    try:
        yield
    finally:
        del config.num_hidden_layers


def new_cache(config: Any) -> DynamicCache:
    """An empty DynamicCache for a model, also where its config does not count its layers by transformers' name."""
    return DynamicCache(config=config) if hasattr(config, "num_hidden_layers") else DynamicCache()


def seen_tokens(cache: Any, spec: CacheSpec) -> bool:
    """Whether an upgraded cache holds tokens; asks no device."""
    first = next(i for i, shape in enumerate(spec) if isinstance(shape, RecurrentShape))
    return first < len(cache.layers) and cache.layers[first].has_tokens


def recurrent_layers(cache: Any) -> list[RecurrentLayer]:
    """The recurrent layers of a cache."""
    return [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]


def _fits(layers: list[Any], spec: CacheSpec) -> bool:
    for layer, shape in zip(layers, spec, strict=False):
        if isinstance(shape, RecurrentShape) and not (
            isinstance(layer, RecurrentLayer) and (layer.spec is spec or layer.spec == spec)
        ):
            return False
    return True


def _check_kind(cache: Any) -> None:
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        _refuse(f"is a {type(cache).__name__}, must be a DynamicCache or StaticCache")
    if hasattr(cache, "linear_cache"):
        _refuse(f"is a {type(cache).__name__}, the cache of the stock model, which a patched model does not use")


def _completed(cache: Cache, spec: CacheSpec, used: int) -> list[Any]:
    """The cache's layers, with those a DynamicCache() would make at first use. The cache itself is left as it is."""
    layers = list(cache.layers)
    make = cache.layer_class_to_replicate
    if make is not None:
        layers += [make() for _ in range(len(layers), len(spec))]
    if len(layers) not in (len(spec), used):
        _refuse(f"has {len(layers)} layers but the model has {len(spec)}")
    return layers


def _layer_for(spec: CacheSpec, index: int, layers: list[Any], static: bool) -> Any:
    """The layer to have at `index`: the one that is there, or a recurrent one in its place."""
    layer, shape = layers[index], spec[index]
    if isinstance(shape, SoftmaxShape):
        _check_softmax(layer, shape, index)
        return layer
    if isinstance(layer, RecurrentLayer) and layer.spec == spec:
        return layer
    if _in_use(layer):
        held = f"{layer.shape}" if isinstance(layer, RecurrentLayer) else "what another model wrote"
        _refuse(f"is of another model: its layer {index} ({type(layer).__name__}) holds {held}, this one needs {shape}")
    if not static:
        new = RecurrentLayer(spec, index)
    else:
        new = StaticRecurrentLayer(spec, index, _max_length(layers))
        # Allocated early where the host has done so: a compiled prefill must find tensors, not make them.
        early = next((x for x in layers if isinstance(x, StaticLayer) and x.is_initialized), None)
        if early is not None and early.keys is not None:
            new.lazy_initialization(early.keys, early.keys)
    if getattr(layer, "record_past", False):
        new.activate_past_recording()
    return new


def _check_softmax(layer: Any, shape: SoftmaxShape, index: int) -> None:
    if not isinstance(layer, CacheLayerMixin) or isinstance(layer, LinearAttentionCacheLayerMixin):
        _refuse(f"is of another model: its layer {index} is a {type(layer).__name__}, this model has softmax there")
    keys = layer.keys
    if layer.is_initialized and keys is not None and keys.dim() == 4:
        held = SoftmaxShape(keys.shape[1], keys.shape[3])
        if held != shape:
            _refuse(f"is of another model: its layer {index} holds {held}, this one needs {shape}")


def _check_lengths(layers: list[Any]) -> None:
    """Every layer must have seen the same tokens: a recurrent layer can not catch up."""
    lengths = {int(layer.get_seq_length()) for layer in layers}
    if len(lengths) > 1:
        _refuse(f"is of another model: its layers hold {sorted(lengths)} tokens, all must hold as many")


def _in_use(layer: Any) -> bool:
    if isinstance(layer, RecurrentLayer):
        return layer.has_tokens
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        states = (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized)
        return any(flag for flags in states for flag in flags.values())
    return layer.is_initialized and int(layer.get_seq_length()) > 0


def _max_length(layers: list[Any]) -> int | None:
    return next((layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer)), None)


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"{CACHE} {reason}: {START_ANEW}")
