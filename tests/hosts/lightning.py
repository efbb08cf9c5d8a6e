"""What MiniCPM-SALA and HypeNet share, in plain PyTorch: lightning attention, the config, the frame of a base model.

Structure and names from `modeling_minicpm_sala.py` of openbmb/MiniCPM-SALA, and from thunlp/hybrid-linear-attention.
Lightning attention is the full matrix. There is no cache: a forward with one raises.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .plain import RMSNorm, RotaryTables, alibi_slopes, causal_mask, decayed_attention, rotated

LIGHTNING, SPARSE = "lightning-attn", "minicpm4"


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
