"""The forward of a patched model: arguments, caches, compiling, precision, gradients."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    StaticCache,
)

import tiny
from leet_hf import (
    patch_model,
    upgrade_cache,
)
from leet_hf.modes.helpers import perturbed
from leet_hf.versions import CACHE, cache_of
from patching import IDS, lightning, outputs, same, skip_unless_stock_pickles


def test_the_state_is_recorded_as_attention_while_decoding() -> None:
    model = patch_model(tiny.model("all-linear"))
    cache = cache_of(model(IDS, use_cache=True))
    output = model(IDS[:, :1], **{CACHE: cache}, output_attentions=True, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for i, state in enumerate(output.attentions):
        assert torch.equal(state, cache.layers[i].recurrent_states[0])
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(model(IDS).attentions) == 4
    model.config.output_attentions = False
    assert model(IDS).attentions is None


def test_one_graph_for_all_lengths_without_a_cache() -> None:
    model = patch_model(tiny.model())
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    forward = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (21, 9, 14):
            ids = torch.tensor([IDS[0, :length].tolist()])
            same(forward(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert len(graphs) == 1
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        options = {"position_ids": positions, "use_cache": False}
        same(forward(IDS[:, :7], **options).logits, model(IDS[:, :7], **options).logits)


def test_a_compiled_copy() -> None:
    """What is pickled must still be traceable: instance forwards are unusual."""
    skip_unless_stock_pickles()
    torch._dynamo.reset()
    copied = pickle.loads(pickle.dumps(patch_model(tiny.model())))
    forward = torch.compile(copied, backend="eager", fullgraph=True)
    same(forward(IDS, use_cache=False)[0], outputs(copied))


BAD_FORWARDS = {
    "both": ({"inputs_embeds": torch.zeros(1, 21, 64)}, "input_ids and inputs_embeds: exactly one"),
    "neither": ({"input_ids": None}, "input_ids and inputs_embeds: exactly one"),
    "packed batch": ({"input_ids": IDS.view(3, 7), "cu_seq_lens_q": torch.tensor([0, 7])}, "with a batch of 3 rows"),
    "index": ({"seq_idx": torch.zeros(1, 20)}, r"seq_idx has shape \[1, 20\], must be \[1, 21\]"),
    "packed pads": (
        {"cu_seq_lens_q": torch.tensor([0, 4, 21]), "attention_mask": torch.arange(21)[None].clamp(max=1)},
        "attention_mask has pads and the sequences are packed",
    ),
}


@pytest.mark.parametrize("name", BAD_FORWARDS)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_bad_arguments_of_forward(layout: str, name: str) -> None:
    arguments, message = BAD_FORWARDS[name]
    model, cache = patch_model(tiny.model(layout)), DynamicCache(config=tiny.config(layout))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, CACHE: cache} | arguments)
    assert upgrade_cache(cache, model).get_seq_length() == 0


def test_packing_and_a_past_do_not_mix() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        cache = cache_of(model(IDS, use_cache=True))
        with pytest.raises(ValueError, match=f"packed sequences were given with {CACHE} that holds tokens"):
            model(IDS[:, :4], **{CACHE: cache}, cu_seq_lens_q=torch.tensor([0, 2, 4]))
        assert {layer.get_seq_length() for layer in cache.layers} == {21}
    static = StaticCache(tiny.config(), max_cache_len=40)
    with pytest.raises(ValueError, match="packed sequences were given with a StaticCache"):
        patch_model(tiny.model())(IDS, **{CACHE: static}, seq_idx=torch.arange(21)[None] // 9)


def test_a_mask_of_ones_with_packed_sequences_is_no_padding() -> None:
    for layout in tiny.LAYOUTS:
        model = patch_model(tiny.model(layout))
        packing = {"cu_seq_lens_q": torch.tensor([0, 8, 21])}
        got = outputs(model, attention_mask=torch.ones_like(IDS), **packing)
        # Positions that do not restart do not make the sequences one.
        assert torch.equal(got, outputs(model, **packing))
        with torch.no_grad():
            same(got[:, 8:], model(IDS[:, 8:], use_cache=False).logits)
        shifted = outputs(model, position_ids=torch.arange(21)[None], **packing)
        with torch.no_grad():
            same(shifted[:, 8:], model(IDS[:, 8:], position_ids=torch.arange(8, 21)[None], use_cache=False).logits)


def test_a_layer_called_with_a_cache_it_can_not_use() -> None:
    module = lightning(patch_model(tiny.model()))[0]
    with pytest.raises(ValueError, match="has a DynamicLayer at layer 0, must be a RecurrentLayer"):
        module(torch.zeros(1, 3, 64), past_key_values=DynamicCache([(torch.zeros(1, 2, 3, 16),) * 2]))


@pytest.mark.parametrize(
    "first, second", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)]
)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_inference_mode(layout: str, first: Any, second: Any) -> None:
    model, want = patch_model(tiny.model(layout)), outputs(tiny.model(layout))
    with first():
        cache = cache_of(model(IDS[:, :18], use_cache=True))
    with second():
        got = [model(IDS[:, i : i + 1], **{CACHE: cache}).logits for i in range(18, 21)]
    same(torch.cat(got, 1), want[:, 18:])


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_autocast_keeps_states_in_float32(layout: str) -> None:
    """Under autocast the keys are bfloat16; the state is that of these keys, to float32 precision."""
    model = patch_model(tiny.model(layout))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(IDS, use_cache=True)
        cache = cache_of(model(IDS[:, :18], use_cache=True))
        for i in range(18, 21):
            output = model(IDS[:, i : i + 1], **{CACHE: cache})
        first = model.config.layer_types.index(tiny.LINEAR)
        state, want = (c.layers[first].recurrent_states[0] for c in (cache, cache_of(whole)))
    assert cache.layers[first].state.keys.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert first > 0 or torch.allclose(state, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits[:, -1], whole.logits[:, -1], rtol=0.1, atol=0.1)


def test_gradients_through_the_cache() -> None:
    """Two forwards with a cache, trained through, have the gradient of one forward."""
    model = patch_model(tiny.model())
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[:, -1].square().sum().backward()
    want, embeds.grad = embeds.grad, None
    cache = cache_of(model(inputs_embeds=embeds[:, :18], use_cache=True))
    model(inputs_embeds=embeds[:, 18:], **{CACHE: cache}).logits[:, -1].square().sum().backward()
    assert want is not None and embeds.grad is not None
    same(embeds.grad, want)


def test_drafts_longer_than_the_window() -> None:
    """Seventy candidates at once are held from the first forward on, however long the prompt."""
    model = patch_model(tiny.model())
    draft = perturbed(model, 0.02)
    draft.generation_config.update(
        num_assistant_tokens=70, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.0
    )
    ids = torch.tensor([tiny.prompts((40,))[0] * 3])
    want = model.generate(ids, max_new_tokens=150, do_sample=False)
    assert torch.equal(model.generate(ids, assistant_model=draft, max_new_tokens=150, do_sample=False), want)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=70, max_new_tokens=150, do_sample=False), want)
