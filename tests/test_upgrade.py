"""Standard caches become those of a patched model; caches of other models are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.minimax.modeling_minimax import MiniMaxCache

import tiny
from leet_hf import patch_model, upgrade_cache
from leet_hf.cache import RecurrentLayer
from leet_hf.static_cache import StaticRecurrentLayer
from leet_hf.upgrade import upgrade
from leet_hf.versions import CACHE, cache_of


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_upgrading_standard_caches(layout: str) -> None:
    config = tiny.config(layout)
    model = patch_model(tiny.model(layout))
    for cache in (
        DynamicCache(config=config),
        DynamicCache(),
        StaticCache(config, max_cache_len=30),
        DynamicCache(config=config, offloading=True),
    ):
        cache.activate_past_recording()
        before = list(cache.layers)
        assert upgrade_cache(cache, model) is cache
        assert len(cache.layers) == 4
        for i, kind in enumerate(config.layer_types):
            static = isinstance(cache, StaticCache)
            if kind == tiny.LINEAR:
                assert type(cache.layers[i]) is (StaticRecurrentLayer if static else RecurrentLayer)
                assert cache.layers[i].record_past == (not static and bool(before))
            elif before:
                assert cache.layers[i] is before[i], "softmax layers stay transformers' own"
        after = list(cache.layers)
        upgrade_cache(cache, model)
        assert all(a is b for a, b in zip(cache.layers, after, strict=True))
        assert cache.is_compileable == isinstance(cache, StaticCache)
        assert cache.get_seq_length() == 0


def test_a_static_cache_allocated_early_is_upgraded_so() -> None:
    """A compiled prefill must find its tensors: they can not be made in a graph."""
    model = patch_model(tiny.model())
    cache = StaticCache(model.config, max_cache_len=30)
    cache.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    upgrade_cache(cache, model)
    assert cache.is_initialized and cache.layers[0].state.base.shape == (3, 4, 16, 16)
    later = upgrade_cache(StaticCache(model.config, max_cache_len=30), model)
    later.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    assert later.is_initialized and later.layers[0].state.base.shape == (3, 4, 16, 16)


@torch.no_grad()
def used(layout: str, **changes: Any) -> DynamicCache:
    """A cache of four tokens of another model."""
    model = patch_model(tiny.model(layout, **changes))
    return cache_of(model(torch.arange(4)[None], use_cache=True))


def contents(layers: list[Any]) -> list[Any]:
    """The tensors of a cache, and its lengths."""
    recurrent = [(x.current_state(), x.get_seq_length()) for x in layers if isinstance(x, RecurrentLayer)]
    return recurrent + [(x.keys, x.values) for x in layers if isinstance(x, DynamicLayer)]


REFUSED = {
    "of the stock model": (MiniMaxCache, "MiniMaxCache, the cache of the stock model"),
    "a tuple": (lambda: ((torch.zeros(1, 2, 3, 4),) * 2,) * 4, "is a tuple, must be a DynamicCache or StaticCache"),
    "of another layout": (lambda: used("softmax-first"), "layer 0 .DynamicLayer. holds"),
    "of other heads": (lambda: used("linear-first", num_attention_heads=2), "layer 0 .RecurrentLayer. holds .*heads=2"),
    "of other softmax heads": (lambda: used("linear-first", num_key_value_heads=4), "layer 0 .* holds"),
    "of fewer layers": (lambda: DynamicCache([(torch.zeros(1, 2, 0, 16),) * 2] * 3), "has 3 layers .* has 4"),
    "empty, of another layout": (
        lambda: DynamicCache(config=tiny.config("all-linear")),
        "layer 3 is a LinearAttention",
    ),
    "of a softmax model": (
        lambda: DynamicCache([(torch.zeros(1, 2, 3, 16),) * 2] * 4),
        "layer 0 .* another model wrote",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_of_another_model_is_refused_and_left_alone(name: str) -> None:
    make, message = REFUSED[name]
    model = patch_model(tiny.model("linear-first"))
    cache = make()
    layers = list(getattr(cache, "layers", ()))
    before = copy.deepcopy(contents(layers))
    with pytest.raises(ValueError, match=f"(?s){CACHE} .*{message}.*: pass no {CACHE}"):
        model(torch.arange(4)[None], **{CACHE: cache})
    if layers:
        assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
        torch.testing.assert_close(contents(layers), before)


def test_a_cache_of_another_batch_is_refused_and_left_alone() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        cache = cache_of(model(torch.arange(4)[None], use_cache=True))
        for _ in range(2):
            with pytest.raises(ValueError, match=f"{CACHE} holds 1 rows but the input has 2: use"):
                model(torch.arange(8).view(2, 4), **{CACHE: cache})
        assert [layer.get_seq_length() for layer in cache.layers] == [4] * 4


def test_softmax_keys_of_the_wrong_shape_are_refused() -> None:
    cache = used("linear-first")
    cache.layers[0].spec = ()
    cache.layers[0].has_previous_state[0] = False
    cache.layers[3].keys = cache.layers[3].keys[..., :8]
    with pytest.raises(ValueError, match=r"layer 3 holds SoftmaxShape\(key_value_heads=2, head_dim=8\)"):
        upgrade(cache, patch_model(tiny.model("linear-first")).model._leet.spec)


def test_layers_that_have_seen_other_tokens_are_refused() -> None:
    cache = DynamicCache(config=tiny.config("softmax-first"))
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match=r"layers hold \[0, 3\] tokens"):
        patch_model(tiny.model("softmax-first"))(torch.arange(4)[None], **{CACHE: cache})


@pytest.mark.parametrize(("layout", "stays_offloading"), [("linear-first", False), ("softmax-first", True)])
def test_a_lone_softmax_layer_is_not_offloaded(layout: str, stays_offloading: bool) -> None:
    """It would be fetched while it is read: offloading fetches the next softmax layer, which is the same one."""
    model = patch_model(tiny.model(layout))
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # what `offloading=True` sets, on machines that have a device to offload from
    upgrade_cache(cache, model)
    assert cache.offloading is stays_offloading
