"""HypeNet in plain PyTorch: class, parameter and argument names as in its code.

Structure and names from `halo/modeling/hypenet/` of thunlp/hybrid-linear-attention; what it shares with MiniCPM-SALA is
in `sala.py`. There is no cache, but its softmax layers, which stay as they are, hand keys and values to one as theirs
do. Left out: short convolutions, other mixers, dropout, scaling of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .lightning import LIGHTNING, LightningAttention, LightningBase, LightningPreTrained, positions
from .plain import MLP, RMSNorm, Rotary, rotated, softmax_attention


class Qwen3Attention(nn.Module):
    """Of HypeNet, whose cache takes keys and values as one and returns all there are."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        wide, few = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, few, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, few, bias=config.attention_bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=config.attention_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps),
            RMSNorm(self.head_dim, config.rms_norm_eps),
        )
        self.use_output_gate = config.attn_use_output_gate
        if self.use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, wide, bias=False)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, cache_position=None,
        position_ids=None, **kwargs,
    ):  # fmt: skip
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        if position_embeddings is not None:
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        if past_key_values is not None:
            state = past_key_values.update(attn_state=(k, v), layer_idx=self.layer_idx, offset=k.shape[-2])
            k, v = state["attn_state"]
        o, _ = softmax_attention(self, q, k, v, attention_mask, self.head_dim**-0.5, **kwargs)
        o = o.flatten(-2)
        if self.use_output_gate:
            o = o * torch.sigmoid(self.o_gate(hidden_states))
        return self.o_proj(o), o, past_key_values


class HypeNetDecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.lightning = config, config.mixer_types[layer_idx] == LIGHTNING
        make: Any = (
            LightningAttention(config, layer_idx, rope=False) if self.lightning else Qwen3Attention(config, layer_idx)
        )
        self.self_attn = make
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, position_embeddings=None, past_key_values=None, **kwargs):
        turns = self.config.lightning_use_rope if self.lightning else self.config.attn_use_rope
        mixed, weights, past_key_values = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_values=past_key_values,
            position_embeddings=position_embeddings if turns else None, **kwargs,
        )  # fmt: skip
        x = hidden_states + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), weights, past_key_values


class HypeNetModel(LightningBase):
    layer_class = HypeNetDecoderLayer

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rotary_emb = Rotary(config.head_dim, config.rope_theta)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, cache_position=None, **kwargs,
    ):  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        ids = positions(x, position_ids)
        assert kwargs.get("cache") is None
        options = {"position_embeddings": self.rotary_emb(x, ids)}
        return self.run(x, ids, attention_mask, past_key_values, use_cache, output_hidden_states, **options)


class HypeNetForCausalLM(LightningPreTrained, GenerationMixin):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = HypeNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, cache_position=None,
        logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            cache_position=cache_position, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip
