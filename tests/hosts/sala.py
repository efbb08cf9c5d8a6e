"""MiniCPM-SALA in plain PyTorch: class, parameter and argument names as in openbmb's remote code.

Structure and names from `modeling_minicpm_sala.py` of openbmb/MiniCPM-SALA (as it also lies in repositories that serve
it). Lightning attention is the full matrix. There is no cache: a forward with one raises, but block-sparse attention,
which stays as it is, hands keys and values to one. Left out: rope scaling, tensor parallel slices, dropout. The
lightning attention, the config and the frame of a base model, which HypeNet has too, are in `lightning.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .lightning import SPARSE, LightningAttention, LightningBase, LightningPreTrained, positions
from .plain import MLP, RMSNorm, RotaryTables, rotated, softmax_attention


class MiniCPMAttention(nn.Module):
    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.attention_dropout = config, layer_idx, config.attention_dropout
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(
            config.hidden_size, self.num_key_value_heads * self.head_dim, bias=config.attention_bias
        )
        self.v_proj = nn.Linear(
            config.hidden_size, self.num_key_value_heads * self.head_dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.rotary_emb = RotaryTables(self.head_dim, config.rope_theta, config.max_position_embeddings)
        self.use_output_gate = config.attn_use_output_gate
        if self.use_output_gate:
            self.o_gate = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, **kwargs,
    ):  # fmt: skip
        assert past_key_value is None
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.attn_use_rope:
            cos, sin = self.rotary_emb(v.float(), seq_len=int(position_ids.max()) + 1)
            q, k = rotated(q, cos[position_ids], sin[position_ids]), rotated(k, cos[position_ids], sin[position_ids])
        o, weights = softmax_attention(self, q, k, v, attention_mask, self.head_dim**-0.5)
        o = o.flatten(-2)
        if self.use_output_gate:
            o = o * torch.sigmoid(self.o_gate(hidden_states))
        return self.o_proj(o), weights if output_attentions else None, past_key_value


class MiniCPMSdpaAttention(MiniCPMAttention):
    pass


class InfLLMv2CacheLayer(DynamicLayer):
    """Keys and values, and the mean key of every full block, a tensor a row."""

    def __init__(self) -> None:
        super().__init__()
        self.compress_k_cache: list[Tensor] = []

    def update_compress_k(self, key_states, cu_seqlens=None):
        old = self.compress_k_cache or [new[:0] for new in key_states]
        self.compress_k_cache = [torch.cat(pair) for pair in zip(old, key_states, strict=True)]
        return self.compress_k_cache


class MiniCPMInfLLMv2Attention(MiniCPMAttention):
    """Reduced to what it asks of a cache: from `dense_len` tokens on, each query sees its own block of tokens and the
    `topk` blocks whose mean keys suit it best. Theirs compresses by overlapping windows, and its kernels need a GPU."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        own = config.sparse_config
        self.dense_len, self.block_size, self.topk = own["dense_len"], own["block_size"], own["topk"]

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, **kwargs,
    ):  # fmt: skip
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx, {})
        tokens, length = q.shape[2], k.shape[2]
        assert attention_mask.shape == (len(q), length)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        place, key = torch.arange(length - tokens, length)[:, None], torch.arange(length)
        seen = (key <= place) & attention_mask[:, None, None].bool()
        if length >= self.dense_len:
            assert bool(attention_mask.all())
            chosen = self.chosen(q, self.means(k, past_key_value), place // self.block_size)
            seen = seen & chosen[..., key // self.block_size]
        scores = (q @ k.mT * self.head_dim**-0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
        o = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        if self.use_output_gate:
            o = o * torch.sigmoid(self.o_gate(hidden_states))
        return self.o_proj(o), None, past_key_value

    def means(self, k: Tensor, cache: Any) -> Tensor:
        """Of full blocks, [B, H, blocks, D]; a cache learns them all at once, then block by block."""
        full = k.shape[2] // self.block_size
        means = k[:, :, : full * self.block_size].unflatten(2, (full, self.block_size)).mean(3)
        if cache is None:
            return means
        if not cache.layers[self.layer_idx].compress_k_cache:
            cache.update_compress_k(list(means.transpose(1, 2)), self.layer_idx)
        elif k.shape[2] % self.block_size == 0:
            cache.update_compress_k(list(means[:, :, -1:].transpose(1, 2)), self.layer_idx)
        return torch.stack(cache.layers[self.layer_idx].compress_k_cache).transpose(1, 2)

    def chosen(self, q: Tensor, means: Tensor, own: Tensor) -> Tensor:
        """Blocks that each query sees, bool [B, H, T, blocks]; own [T, 1]: the block of each query."""
        blocks = torch.arange(means.shape[2] + 1)
        scores = torch.cat([q @ means.mT, torch.zeros_like(q[..., :1])], -1).masked_fill(blocks >= own, -1e9)
        best = scores.topk(min(self.topk, len(blocks)), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & (blocks < own) | (blocks == own)


class MiniCPMSALADecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        if config.mixer_types[layer_idx] == SPARSE:
            kind = MiniCPMSdpaAttention if config.sparse_config is None else MiniCPMInfLLMv2Attention
            self.self_attn: nn.Module = kind(config, layer_idx)
        else:
            self.self_attn = LightningAttention(config, layer_idx, rope=True)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.depth = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, **kwargs,
    ):  # fmt: skip
        mixed, weights, cache = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, position_ids=position_ids,
            past_key_value=past_key_value, output_attentions=output_attentions, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        x = hidden_states + mixed * self.depth
        x = x + self.mlp(self.post_attention_layernorm(x)) * self.depth
        return x, *((weights,) if output_attentions else ()), *((cache,) if use_cache else ())


class MiniCPMSALAModel(LightningBase):
    layer_class = MiniCPMSALADecoderLayer

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        x = self.embed_tokens(input_ids) * self.config.scale_emb if inputs_embeds is None else inputs_embeds
        ids = positions(x, position_ids)
        return self.run(x, ids, attention_mask, past_key_values, use_cache, output_hidden_states)


class MiniCPMSALAForCausalLM(LightningPreTrained, GenerationMixin):
    """With methods for generation of an older transformers, and a forward that hands on only what it knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MiniCPMSALAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = outputs[0][:, kept] / (self.config.hidden_size / self.config.dim_model_base)
        logits, loss = self.lm_head(x).float(), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        assert past_key_values is None and kwargs.get("cache") is None, "made for the host's own cache"
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": kwargs.get("use_cache")}

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past_key_values)
