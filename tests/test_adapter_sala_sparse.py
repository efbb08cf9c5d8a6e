"""MiniCPM-SALA with block-sparse attention, which keeps its own forward: what it needs of a standard cache."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import host_checks
import tiny
from hosts import sala
from hosts.lightning import LIGHTNING, SPARSE, LightningConfig
from hosts.sala import InfLLMv2CacheLayer, MiniCPMSALAForCausalLM
from leet_hf import patch_model, patch_report, upgrade_cache
from leet_hf.modes import Truth
from leet_hf.modes.helpers import generate
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_of

DENSE = 24  # tokens up to which it is dense
SETTINGS = {
    "sparse_config": {"dense_len": DENSE, "block_size": 4, "topk": 2},
    "mixer_types": (SPARSE, LIGHTNING, SPARSE),
}


def stock(**changes: Any) -> Any:
    return host_checks.make(MiniCPMSALAForCausalLM, LightningConfig(**SETTINGS | changes))


# It is sparse for a whole forward or not at all, so that a truth without a cache begins with as many tokens.
PROMPTS = tiny.prompts((27, 33, 25))


@functools.cache
def truth() -> Truth:
    return Truth(stock(), PROMPTS)


@functools.cache
def patched() -> Any:
    return patch_model(stock())


@pytest.mark.parametrize("name", ["greedy", "sampling", "beam", "num-return-sequences", "dynamic-cache-given"])
def test_modes(name: str) -> None:
    host_checks.must_agree(name, patched(), truth())


def test_sparse_attention_matters_here() -> None:
    """Else these tests would pass without it."""
    prompt = tiny.prompts((40,))
    dense = stock(sparse_config=SETTINGS["sparse_config"] | {"dense_len": 1000})
    ids = torch.tensor(prompt)
    assert relative_error(stock()(input_ids=ids).logits[:, 30:], dense(input_ids=ids).logits[:, 30:]) > 1e-2
    assert relative_error(patched()(input_ids=ids, use_cache=False).logits, stock()(input_ids=ids).logits) <= 1e-5


def test_logits_and_gradients() -> None:
    host_checks.same_logits_and_gradients(stock(), batch=1, tokens=40)


def test_its_cache_layers_are_of_its_own_class() -> None:
    _, output = generate(patched(), PROMPTS[:1], 12)
    layer = cache_of(output).layers[0]
    assert isinstance(layer, InfLLMv2CacheLayer) and layer.compress_k_cache[0].shape[0] == (27 + 11) // 4


def test_padding_while_it_is_dense() -> None:
    rows, _ = generate(patched(), tiny.prompts(), 6)
    assert [row.tokens for row in rows] == [truth().greedy(prompt, 6) for prompt in tiny.prompts()]


@torch.no_grad()
@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "crop", "reset"])
def test_compressed_keys_follow_the_rows_and_tokens_of_a_cache(change: str) -> None:
    prompts = tiny.prompts((33, 33))
    cache = DynamicCache()
    patched()(input_ids=torch.tensor(prompts), **{CACHE: cache}, use_cache=True)
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        prompts.reverse()
    elif change == "select":
        cache.batch_select_indices(torch.tensor([1]))
        del prompts[0]
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        prompts = [prompt for prompt in prompts for _ in range(2)]
    elif change == "crop":
        cache, prompts = cropped(prompts)
    else:
        if (lacking := host_checks.MODES["reset"].missing()) is not None:
            pytest.skip(lacking)
        cache.reset()
        patched()(input_ids=torch.tensor(prompts), **{CACHE: cache}, use_cache=True)
    got = patched()(input_ids=torch.full((len(prompts), 1), 7), **{CACHE: cache}, use_cache=True).logits[:, -1]
    for row, prompt in zip(got, prompts, strict=True):
        assert relative_error(row, truth().logits([*prompt, 7])[-1]) <= 1e-5


def cropped(prompts: list[list[int]]) -> tuple[Any, list[list[int]]]:
    """A cache that took back tokens written since the 33rd, over the bound of a block."""
    cache = upgrade_cache(DynamicCache(), patched())
    cache.activate_past_recording()
    patched()(input_ids=torch.tensor(prompts), **{CACHE: cache}, use_cache=True)
    cache.crop(0)
    for token in (3, 4, 5, 6):
        patched()(input_ids=torch.full((len(prompts), 1), token), **{CACHE: cache}, use_cache=True)
    cache.crop(-3)
    return cache, [[*prompt, 3] for prompt in prompts]


def test_what_it_can_not_do_is_refused() -> None:
    (prompt,) = tiny.prompts((30,))
    ids = torch.tensor([prompt])
    model = patched()
    cache = cache_of(model(input_ids=ids[:, :20], use_cache=True))
    with pytest.raises(ValueError, match=r"10 tokens were given after 20 .*one by one"):
        model(input_ids=ids[:, 20:], **{CACHE: cache})
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="sequences are packed"):
        model(input_ids=ids, seq_idx=torch.arange(30)[None] // 10)
    with pytest.raises(ValueError, match="needs a DynamicCache"):
        model(input_ids=ids, **{CACHE: StaticCache(config=model.config, max_cache_len=40)})
    with pytest.raises(ValueError, match="not a mask of pads"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 30, 30))


def test_report_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    host_checks.patched_and_back(stock(), "minicpm_sala", [1], 3)
    assert patch_report(patched()).layers[0].reason == "MiniCPMInfLLMv2Attention is no recurrent layer"
    model = stock()
    model.model.layers[2].self_attn = sala.MiniCPMSdpaAttention(model.config, 2)
    host_checks.is_refused(model, "some of its softmax layers are block-sparse")
    model = stock(attn_use_rope=True)
    model.model.layers[2].self_attn.rotary_emb.cos_cached.zero_()
    host_checks.is_refused(model, "layers.2.self_attn .*not in the checkpoint")
    monkeypatch.delattr(sala, "InfLLMv2CacheLayer")
    host_checks.is_refused(stock(), "no InfLLMv2CacheLayer beside its class")


def test_a_patched_model_can_be_copied() -> None:
    model = copy.deepcopy(patched())
    assert generate(model, PROMPTS[:1], 6)[0][0].tokens == truth().greedy(PROMPTS[0], 6)
