"""Layers of Ring / Ling linear 2.0 and 2.5 in plain PyTorch: names as in inclusionAI's remote code.

Structure and names from `models/modeling_bailing_moe_v2_5.py` of the repository inclusionAI/Ring-V2.5 (2.5: latent
attention with a rope of its own) and, for 2.0, from the model card of Ring-mini-linear-2.0 and SGLang's and MLX's
loaders of its checkpoints (grouped softmax attention on one projection, one rope for both). The linear attention is the
full matrix; there is no cache: a forward with one raises. Left out: rope scaling, groups of experts, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .plain import MLP, RMSNorm, alibi_slopes, decayed_attention, rotated, softmax_attention


class BailingMoeV2_5GroupRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, group_norm_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_norm_size, self.variance_epsilon = group_norm_size, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float().unflatten(-1, (self.group_norm_size, -1))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.flatten(-2).to(x)


class _LinearAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = self.num_key_value_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        wide = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * wide, bias=config.use_qkv_bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(wide, config.hidden_size, bias=config.use_bias)
        self.g_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.g_norm = BailingMoeV2_5GroupRMSNorm(wide, config.group_norm_size, config.rms_norm_eps)
        depth = 1 - (layer_idx - 1) / (config.num_hidden_layers - 1) + 1e-5
        self.register_buffer("slope", -torch.tensor(alibi_slopes(self.num_heads)) * depth, persistent=False)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        assert not output_attentions and past_key_value is None
        packed = self.query_key_value(hidden_states)
        if self.config.linear_silu:
            packed = nn.functional.silu(packed)
        packed = packed.unflatten(-1, (3 * self.num_heads, self.head_dim)).transpose(1, 2)
        q, k, v = packed.split(self.num_heads, dim=1)
        if self.config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = rotated(q, *position_embeddings), rotated(k, *position_embeddings)
        o = decayed_attention(q, k, v, -self.slope, self.head_dim**-0.5).transpose(1, 2).flatten(-2)
        return self.dense(self.g_norm(o) * torch.sigmoid(self.g_proj(hidden_states))), None, past_key_value


class BailingMoeV2LinearAttention(_LinearAttention):
    pass


class BailingMoeV2_5LinearAttention(_LinearAttention):
    pass


class BailingMoeV2Attention(nn.Module):
    """2.0: grouped heads, the same partial rope as the linear layers."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.use_qkv_bias)
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        few = self.num_key_value_heads
        packed = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = packed.split([self.num_heads, few, few], dim=1)
        if self.config.use_qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        cos, sin = position_embeddings
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx, {"sin": sin, "cos": cos})
        o, weights = softmax_attention(self, q, k, v, attention_mask, self.head_dim**-0.5)
        return self.dense(o.flatten(-2)), weights if output_attentions else None, past_key_value


class BailingMoeV2_5MultiLatentAttention(nn.Module):
    """2.5: keys and values from a latent; rope, whose channels are interleaved, on a part of each head."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.num_heads = config, layer_idx, config.num_attention_heads
        self.num_key_value_groups, self.qk_head_dim = 1, config.qk_head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * config.qk_head_dim, bias=False)
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, latent, bias=config.use_qkv_bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        made = self.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, made, bias=False)
        self.dense = nn.Linear(self.num_heads * config.v_head_dim, config.hidden_size, bias=config.use_qkv_bias)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, cache_position=None, **kwargs
    ):
        config, rope = self.config, self.config.qk_rope_head_dim
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        latent, k_turn = self.kv_a_proj_with_mqa(hidden_states).split([config.kv_lora_rank, rope], dim=-1)
        made = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = made.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        q, q_turn = q.split([config.qk_nope_head_dim, rope], dim=-1)
        q_turn, k_turn = (
            rotated(torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1), *position_embeddings)
            for x in (q_turn, k_turn[:, None])
        )
        q = torch.cat([q, q_turn], dim=-1)
        k = torch.cat([k, k_turn.expand(-1, self.num_heads, -1, -1)], dim=-1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        o, weights = softmax_attention(self, q, k, v, attention_mask, self.qk_head_dim**-0.5, **kwargs)
        return self.dense(o.flatten(-2)), weights, past_key_values


class BailingMoeV2SparseMoeBlock(nn.Module):
    """Every expert on every token, weighed by normed sigmoid scores of the best ones, and a shared expert."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList([MLP(config.hidden_size, inner) for _ in range(config.num_experts)])
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.shared_experts = MLP(config.hidden_size, inner)

    def forward(self, x: Tensor):
        logits = self.gate(x).float()
        scores = logits.sigmoid()
        chosen = scores.topk(self.top_k, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, scores.gather(-1, chosen))
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))
        return y + self.shared_experts(x), (logits, chosen)


class _Block(nn.Module):
    """Attention and MLP with their norms; `experts` says which MLP."""

    def __init__(self, config: Any, attention: nn.Module, experts: bool) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = BailingMoeV2SparseMoeBlock(config) if experts else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def block(
        self, x: Tensor, output_attentions: bool, output_router_logits: bool, use_cache: bool, arguments: dict[str, Any]
    ):
        mixed, weights, cache = self.attention(hidden_states=self.input_layernorm(x), use_cache=use_cache, **arguments)
        x = x + mixed
        y = self.mlp(self.post_attention_layernorm(x))
        y, router_logits = y if isinstance(y, tuple) else (y, None)
        outputs: tuple[Any, ...] = (weights,) if output_attentions else ()
        outputs += (cache,) if use_cache else ()
        return x + y, *outputs, *((router_logits,) if output_router_logits else ())


class BailingMoeV2DecoderLayer(_Block):
    def __init__(self, config: Any, layer_idx: int) -> None:
        last_group = config.num_hidden_layers // config.layer_group_size * config.layer_group_size
        self_softmax = (layer_idx + 1) % config.layer_group_size == 0 or layer_idx >= last_group
        if config.kv_lora_rank is None:
            kind = BailingMoeV2Attention if self_softmax else BailingMoeV2LinearAttention
        else:
            kind = BailingMoeV2_5MultiLatentAttention if self_softmax else BailingMoeV2_5LinearAttention
        super().__init__(config, kind(config, layer_idx), layer_idx >= config.first_k_dense_replace)
        self.attention_layer_type = "attention" if self_softmax else "linear_attention"

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, cache_position=None,
        output_attentions=False, output_router_logits=False, use_cache=False, position_embeddings=None,
        position_embeddings_mla=None, **kwargs,
    ):  # fmt: skip
        options: dict[str, Any] = {"position_ids": position_ids}
        latent = isinstance(self.attention, BailingMoeV2_5MultiLatentAttention)
        if latent:
            options |= {"past_key_values": past_key_value, "cache_position": cache_position, **kwargs}
        else:
            options |= {"past_key_value": past_key_value, "output_attentions": output_attentions}
        if self.attention_layer_type == "linear_attention":
            if attention_mask is None:
                attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.int32, device=hidden_states.device)
            elif attention_mask.dim() == 4:
                attention_mask = (attention_mask[:, 0, -1] > -1e4).to(torch.int32)
        options["attention_mask"] = attention_mask
        options["position_embeddings"] = position_embeddings_mla if latent else position_embeddings
        return self.block(hidden_states, output_attentions, output_router_logits, use_cache, options)


class BailingMoeV2_5MTPLayer(_Block):
    """Predicts one token further on, from the hidden states and the embeddings of the next tokens."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, BailingMoeV2_5MultiLatentAttention(config, layer_idx), True)
        self.enorm, self.hnorm, self.final_layernorm = (RMSNorm(config.hidden_size) for _ in range(3))
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, input_embeds, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
        output_attentions=False, output_router_logits=False, use_cache=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        x = self.eh_proj(torch.cat([self.enorm(input_embeds), self.hnorm(hidden_states)], dim=-1))
        options = {"attention_mask": attention_mask, "past_key_values": past_key_value}
        options["position_embeddings"] = position_embeddings
        first, *rest = self.block(x, output_attentions, output_router_logits, use_cache, options)
        return self.final_layernorm(first), *rest
