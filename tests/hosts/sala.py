"""MiniCPM-SALA in plain PyTorch: class, parameter and argument names as in openbmb's remote code.

Structure and names from `modeling_minicpm_sala.py` of openbmb/MiniCPM-SALA (as it also lies in repositories that serve
it). Lightning attention is the full matrix. There is no cache: a forward with one raises, but block-sparse attention,
which stays as it is, hands keys and values to one. Left out: rope scaling, tensor parallel slices, dropout. What
HypeNet shares with it is here too: the lightning attention, the config, the frame of a base model.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .plain import MLP, RMSNorm, RotaryTables, causal_mask, decayed_attention, rotated, softmax_attention

LIGHTNING, SPARSE = "lightning-attn", "minicpm4"


def alibi_slopes(heads: int) -> list[float]:
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


class LightningConfig(PreTrainedConfig):
    """Both families' fields. Tiny by default."""

    model_type = "lightning_stand_in"

    def __init__(
        self, vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, mixer_types=(SPARSE, LIGHTNING, LIGHTNING), rms_norm_eps=1e-6,
        rope_theta=10000.0, rope_scaling=None, max_position_embeddings=64, attention_bias=False, attention_dropout=0.0,
        initializer_range=0.2, use_cache=True, scale_emb=2.0, scale_depth=1.4, dim_model_base=16, qk_norm=True,
        use_output_gate=True, use_output_norm=True, attn_use_rope=False, attn_use_output_gate=True, lightning_nkv=2,
        lightning_use_rope=True, lightning_scale="1/sqrt(d)", sparse_config=None, sliding_window=None,
        use_sliding_window=False, **kwargs,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class LightningAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int, rope: bool) -> None:
        super().__init__()
        self.layer_idx, self.hidden_size, self.head_dim = layer_idx, config.hidden_size, config.head_dim
        self.num_attention_heads, self.num_key_value_heads = config.num_attention_heads, config.lightning_nkv
        self.num_key_value_groups = self.num_attention_heads // self.num_key_value_heads
        self.scale = {"1/sqrt(d)": self.head_dim**-0.5, "1/d": self.head_dim**-1.0}.get(config.lightning_scale, 1.0)
        self.use_output_gate, self.use_output_norm = config.use_output_gate, config.use_output_norm
        self.use_rope, self.qk_norm = config.lightning_use_rope, config.qk_norm
        wide, few, bias = (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            config.attention_bias,
        )
        self.q_proj = nn.Linear(self.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(self.hidden_size, few, bias=bias)
        self.v_proj = nn.Linear(self.hidden_size, few, bias=bias)
        self.o_proj = nn.Linear(wide, self.hidden_size, bias=bias)
        if self.use_output_norm:
            self.o_norm = RMSNorm(wide, config.rms_norm_eps)
        if self.use_output_gate:
            self.z_proj = nn.Linear(self.hidden_size, wide, bias=bias)
        if self.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(self.head_dim, config.rms_norm_eps),
                RMSNorm(self.head_dim, config.rms_norm_eps),
            )
        if rope:  # MiniCPM-SALA: each attention has tables of its own
            self.rotary_emb = RotaryTables(self.head_dim, config.rope_theta, config.max_position_embeddings)

    def forward(
        self, hidden_states, position_ids=None, position_embeddings=None, attention_mask=None, past_key_value=None,
        past_key_values=None, use_cache=False, **kwargs,
    ):  # fmt: skip
        assert past_key_value is None and past_key_values is None
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.use_rope:
            if hasattr(self, "rotary_emb"):
                tables = self.rotary_emb(v.float(), seq_len=int(position_ids.max()) + 1)
                position_embeddings = [table[position_ids] for table in tables]
            q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        k, v = (x.repeat_interleave(self.num_key_value_groups, dim=1) for x in (k, v))
        slopes = torch.tensor(alibi_slopes(self.num_attention_heads), device=q.device)
        o = decayed_attention(q.float(), k.float(), v.float(), slopes, self.scale)
        o = o.transpose(1, 2).flatten(-2).to(hidden_states.dtype)
        if self.use_output_norm:
            o = self.o_norm(o)
        if self.use_output_gate:
            o = o * torch.sigmoid(self.z_proj(hidden_states))
        return self.o_proj(o), None, None


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


class LightningPreTrained(PreTrainedModel):
    config_class = LightningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["MiniCPMSALADecoderLayer", "HypeNetDecoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def get_input_embeddings(self):
        return getattr(self, "model", self).embed_tokens


class LightningBase(LightningPreTrained):
    layer_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def run(
        self, x: Tensor, position_ids: Any, attention_mask: Any, past: Any, use_cache: Any, asked: Any, **options: Any
    ):
        assert past is None
        assert attention_mask is None or bool(attention_mask.all())
        mask = causal_mask(x.shape[1], x, self.config._attn_implementation)
        if self.config.sparse_config is not None:
            mask = torch.ones(x.shape[:2], dtype=torch.int64)
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask=mask, position_ids=position_ids, **options)[0])
        states[-1] = self.norm(states[-1])
        return BaseModelOutputWithPast(states[-1], hidden_states=tuple(states) if asked else None)


def positions(x: Tensor, position_ids: Any) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)[None] if position_ids is None else position_ids


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
