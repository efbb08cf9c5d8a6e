"""DecayLinearAttention inside a model of one's own: every decoding mode of generate(), without patch_model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

import host_checks
import tiny
from leet_hf import DecayLinearAttention, upgrade_cache
from leet_hf.cache import RecurrentLayer
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_argument, create_causal_mask, create_recurrent_attention_mask


class OwnBlock(nn.Module):
    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        sizes = {"layer_idx": index, "num_key_value_heads": 2, "num_layers": 3}
        decay = {0: "minimax_text_01", 2: "learned"}.get(index)
        self.linear = decay is not None
        self.attention = (
            DecayLinearAttention(32, 4, decay=decay, **sizes) if self.linear else LlamaAttention(config, index)  # type: ignore[arg-type]
        )
        self.mlp, self.first, self.second = LlamaMLP(config), LlamaRMSNorm(32), LlamaRMSNorm(32)

    def forward(self, x: torch.Tensor, masks: tuple[Any, Any], **options: Any) -> torch.Tensor:
        x = x + self.attention(self.first(x), attention_mask=masks[int(not self.linear)], **options)[0]
        return x + self.mlp(self.second(x))


class OwnModel(PreTrainedModel):
    config_class, base_model_prefix, _supports_sdpa, _no_split_modules = LlamaConfig, "model", True, ("OwnBlock",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 32)
        self.layers = nn.ModuleList([OwnBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm, self.rope = LlamaRMSNorm(32), LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any, embeds: Any, **kwargs: Any
    ) -> Any:
        x = self.embed(input_ids) if embeds is None else embeds
        if position_ids is None:
            start = past.get_seq_length() if past is not None else 0
            position_ids = (torch.arange(x.shape[1]) + start)[None]
        arguments = {"config": self.config, "inputs_embeds": x, "position_ids": position_ids, CACHE: past}
        masks: Any = attention_mask
        if not isinstance(attention_mask, dict):
            make = (create_recurrent_attention_mask, create_causal_mask)
            masks = tuple(f(attention_mask=attention_mask, **arguments) for f in make)
        turns = self.rope(x, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, masks, position_embeddings=turns, **{CACHE: past}, **kwargs)
        return self.norm(x)


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix, _supports_sdpa = LlamaConfig, "model", True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model, self.lm_head = OwnModel(config), nn.Linear(32, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def create_masks_for_generate(self, config: Any, inputs_embeds: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return attention_mask  # the base model makes one for each kind of layer

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        inputs_embeds: Any = None, use_cache: Any = None, cache: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        past = cache_argument(past_key_values, cache)
        past = DynamicCache() if past is None and use_cache else past
        x = self.model(input_ids, attention_mask, position_ids, past, inputs_embeds, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(x), **{CACHE: past})


@functools.cache
def own() -> Any:
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    return host_checks.make(OwnForCausalLM, config)


@functools.cache
def truth() -> Truth:
    return Truth(own(), tiny.prompts())


MODES = (
    "greedy", "beam", "left-padding", "chunked-prefill", "middle-padding", "chat", "multi-token", "static-cache",
    "dynamic-cache-given", "static-cache-given", "reset", "batch-select", "reorder", "assisted-recurrent-draft",
    "assisted-softmax-draft", "prompt-lookup", "lora", "chat-padded-batch-in-chunks", "static-left-padding",
)  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_modes_of_a_model_with_it(name: str) -> None:
    host_checks.must_agree(name, own(), truth())


def test_patching_it_is_not_needed() -> None:
    host_checks.is_refused(own(), "DecayLinearAttention layers, which need no patching")


def test_compiled_steps_of_a_model_with_it() -> None:
    """After `upgrade_cache`, one graph serves all lengths."""
    model, tokens = own(), tiny.prompts()[0]
    cache = upgrade_cache(StaticCache(config=model.config, max_cache_len=40), model)
    assert [isinstance(layer, RecurrentLayer) for layer in cache.layers] == [True, False, True]
    torch._dynamo.reset()
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens[:-3]]), **{CACHE: cache})
        step = torch.compile(model.__call__, backend="eager", fullgraph=True)
        logits = [step(input_ids=torch.tensor([[token]]), **{CACHE: cache}).logits for token in tokens[-3:]]
    assert relative_error(torch.cat(logits, 1)[0], truth().logits(tokens)[-3:]) <= 1e-4
