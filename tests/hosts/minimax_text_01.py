"""MiniMax-Text-01 in plain PyTorch: class, parameter and argument names as in MiniMaxAI's remote code.

Structure and names from `modeling_minimax_text_01.py` of MiniMaxAI/MiniMax-Text-01 (MiniMax-M1 has the same under
names of its own). Lightning attention is the full matrix; the softmax layers, theirs by flash attention, are plain.
There is no cache: a forward with one raises. Left out: dropout, noise of the router, what its linear layers do in
training (nothing).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .plain import MLP, RMSNorm, RotaryTables, alibi_slopes, causal_mask, decayed_attention, rotated, softmax_attention


class MiniMaxText01Config(PreTrainedConfig):
    """Tiny by default. `attn_type_list`: 0 is linear."""

    model_type = "minimax_text_01_stand_in"

    def __init__(
        self, vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rotary_dim=4, attn_type_list=(0, 0, 1), hidden_act="silu", rms_norm_eps=1e-5,
        rope_theta=10000.0, max_position_embeddings=64, attention_dropout=0.0, num_local_experts=3,
        num_experts_per_tok=2, shared_intermediate_size=16, postnorm=True, layernorm_linear_attention_alpha=1.5,
        layernorm_linear_attention_beta=0.9, layernorm_full_attention_alpha=1.3, layernorm_full_attention_beta=1.1,
        layernorm_mlp_alpha=1.2, layernorm_mlp_beta=0.8, router_aux_loss_coef=0.01, initializer_range=0.2,
        use_cache=True, output_router_logits=False, sliding_window=None, **kwargs,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class MiniMaxText01LightningAttention(nn.Module):
    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.head_dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
        )
        wide = self.num_heads * self.head_dim
        self.out_proj = nn.Linear(wide, self.hidden_size, bias=False)
        self.act = nn.functional.silu
        self.norm = RMSNorm(wide)
        self.qkv_proj = nn.Linear(self.hidden_size, 3 * wide, bias=False)
        self.output_gate = nn.Linear(self.hidden_size, wide, bias=False)
        self.offset, self.layer_idx = 0, layer_idx

    def forward(
        self, hidden_states, attn_mask=None, output_attentions=False, past_key_value=None, use_cache=False,
        slope_rate=None, **kwargs,
    ):  # fmt: skip
        assert past_key_value is None
        packed = self.act(self.qkv_proj(hidden_states)).unflatten(-1, (self.num_heads, -1))
        q, k, v = (x.transpose(1, 2) for x in packed.split(self.head_dim, dim=-1))
        o = decayed_attention(q, k, v, slope_rate.flatten(), 1.0).transpose(1, 2).flatten(-2)
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o)), None, None


class MiniMaxText01Attention(nn.Module):
    is_causal = True

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__()
        self.config, self.layer_idx, self.attention_dropout = config, layer_idx, config.attention_dropout
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_groups = config.head_dim, self.num_heads // self.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.rotary_emb = RotaryTables(config.rotary_dim, config.rope_theta, config.max_position_embeddings)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        use_cache=False, **kwargs,
    ):  # fmt: skip
        assert past_key_value is None
        q, k, v = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary_emb(v, seq_len=int(position_ids.max()) + 1)
        q, k = rotated(q, cos[position_ids], sin[position_ids]), rotated(k, cos[position_ids], sin[position_ids])
        mask = causal_mask(q.shape[2], q, self.config._attn_implementation)
        o, weights = softmax_attention(self, q, k, v, mask, self.head_dim**-0.5)
        return self.o_proj(o.flatten(-2)), weights if output_attentions else None, past_key_value


class MiniMaxText01FlashAttention2(MiniMaxText01Attention):
    pass


class MiniMaxText01BlockSparseTop2MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class MiniMaxText01SparseMoeBlock(nn.Module):
    """Every expert on every token, weighed by the softmax over the best ones."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList([MiniMaxText01BlockSparseTop2MLP(config) for _ in range(config.num_local_experts)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        weights = logits.softmax(-1, dtype=torch.float32)
        chosen = weights.topk(self.top_k, dim=-1).indices
        weights = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = sum(expert(x) * weights[..., i : i + 1] for i, expert in enumerate(self.experts))
        return y, logits.flatten(0, 1)


class MiniMaxText01DecoderLayer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        linear = config.attention_type == 0
        kind = MiniMaxText01LightningAttention if linear else MiniMaxText01FlashAttention2
        self.self_attn = kind(config, layer_idx)
        self.block_sparse_moe = MiniMaxText01SparseMoeBlock(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.postnorm = config.postnorm
        name = "linear" if linear else "full"
        self.alphas = getattr(config, f"layernorm_{name}_attention_alpha"), config.layernorm_mlp_alpha
        self.betas = getattr(config, f"layernorm_{name}_attention_beta"), config.layernorm_mlp_beta
        self.shared_moe = config.shared_intermediate_size > 0
        if self.shared_moe:
            self.shared_mlp = MLP(config.hidden_size, config.intermediate_size)
            self.coefficient = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None, output_attentions=False,
        output_router_logits=False, use_cache=False, slope_rate=None, **kwargs,
    ):  # fmt: skip
        x = self.input_layernorm(hidden_states)
        residual = x if self.postnorm else hidden_states
        mixed, weights, cache = self.self_attn(
            hidden_states=x, position_ids=position_ids, attn_mask=attention_mask, past_key_value=past_key_value,
            output_attentions=output_attentions, use_cache=use_cache, slope_rate=slope_rate,
        )  # fmt: skip
        hidden_states = residual * self.alphas[0] + mixed * self.betas[0]
        x = self.post_attention_layernorm(hidden_states)
        residual = x if self.postnorm else hidden_states
        y, router_logits = self.block_sparse_moe(x)
        if self.shared_moe:
            share = torch.sigmoid(self.coefficient(x).float()).to(x.dtype)
            y = y * (1 - share) + self.shared_mlp(x) * share
        outputs: tuple[Any, ...] = (residual * self.alphas[1] + y * self.betas[1],)
        outputs += (weights,) if output_attentions else ()
        outputs += (cache,) if use_cache else ()
        return outputs + ((router_logits,) if output_router_logits else ())


class MiniMaxText01PreTrainedModel(PreTrainedModel):
    config_class = MiniMaxText01Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["MiniMaxText01DecoderLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def get_input_embeddings(self):
        return getattr(self, "model", self).embed_tokens


class MiniMaxText01Model(MiniMaxText01PreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([])
        for i in range(config.num_hidden_layers):
            own = copy.deepcopy(config)
            own.attention_type = config.attn_type_list[i]
            self.layers.append(MiniMaxText01DecoderLayer(own, i))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.slopes = torch.tensor(alibi_slopes(config.num_attention_heads)).reshape(-1, 1, 1)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None, return_dict=None,
    ):  # fmt: skip
        assert past_key_values is None
        assert attention_mask is None or bool(attention_mask.all())
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        states, routers = [x], []
        for i, layer in enumerate(self.layers):
            slope_rate = self.slopes.to(x.device) * (1 - i / (len(self.layers) - 1) + 1e-5)
            outputs = layer(states[-1], None, position_ids, output_router_logits=True, slope_rate=slope_rate)
            states.append(outputs[0])
            routers.append(outputs[-1])
        states[-1] = self.norm(states[-1])
        return MoeModelOutputWithPast(
            states[-1], hidden_states=tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers) if output_router_logits else None,
        )  # fmt: skip


class MiniMaxText01ForCausalLM(MiniMaxText01PreTrainedModel, GenerationMixin):
    """With methods for generation of an older transformers, and a forward that takes no arguments but its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MiniMaxText01Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None,
        return_dict=None,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits, return_dict=return_dict,
        )  # fmt: skip
        logits, loss = self.lm_head(outputs[0]).float(), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            if output_router_logits:  # the balance of the experts, by their mean probabilities alone
                means = torch.cat([x.softmax(-1) for x in outputs.router_logits]).mean(0)
                loss = loss + self.config.router_aux_loss_coef * means.square().sum()
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, router_logits=outputs.router_logits,
        )  # fmt: skip

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        assert past_key_values is None and kwargs.get("cache") is None, "made for tuples of states"
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": kwargs.get("use_cache")}

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        return tuple(tuple(state.index_select(0, beam_idx) for state in layer) for layer in past_key_values)
