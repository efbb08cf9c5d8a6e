"""Ring / Ling linear 2.0 and 2.5 in plain PyTorch: config and models; the layers, and their sources, are in
`bailing_layers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .bailing_layers import BailingMoeV2_5MTPLayer, BailingMoeV2DecoderLayer
from .plain import RMSNorm, Rotary, causal_mask


class BailingConfig(PreTrainedConfig):
    """Both versions' fields. Tiny by default; `kv_lora_rank` None is 2.0."""

    model_type = "bailing_stand_in"

    def __init__(
        self, vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, use_qkv_bias=True, use_bias=False, rms_norm_eps=1e-6, rope_theta=10000.0,
        partial_rotary_factor=0.5, use_qk_norm=True, linear_silu=False, layer_group_size=3, group_norm_size=2,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
        num_nextn_predict_layers=0, mtp_loss_scaling_factor=0.3, kv_lora_rank=None, q_lora_rank=None,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, initializer_range=0.2, use_cache=True,
        output_router_logits=False, **kwargs,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        self.qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class BailingPreTrainedModel(PreTrainedModel):
    config_class = BailingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BailingMoeV2DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


@dataclass
class BailingOutput(MoeModelOutputWithPast):
    mtp_hidden_states: Any = None


class BailingMoeV2Model(BailingPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        count, further = config.num_hidden_layers, config.num_nextn_predict_layers
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [BailingMoeV2DecoderLayer(config, i) for i in range(count)]
        self.layers = nn.ModuleList(layers + [BailingMoeV2_5MTPLayer(config, count + i) for i in range(further)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Rotary(int(config.head_dim * config.partial_rotary_factor), config.rope_theta)
        if config.kv_lora_rank is not None:
            self.rotary_emb_mla = Rotary(config.qk_rope_head_dim, config.rope_theta)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        cache_position=None, use_cache=None, output_attentions=None, output_hidden_states=None,
        output_router_logits=None, return_dict=None, **kwargs,
    ):  # fmt: skip
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = x.shape[1]
        assert past_key_values is None and not use_cache and not kwargs.get("cache")
        assert attention_mask is None or bool(attention_mask.all())
        if position_ids is None:
            position_ids = torch.arange(tokens, device=x.device)[None]
        mask = causal_mask(tokens, x, self.config._attn_implementation)
        options = {"attention_mask": mask, "position_ids": position_ids, "output_router_logits": output_router_logits}
        turns = self.rotary_emb(x, position_ids)
        options["position_embeddings"] = turns
        mla = (
            {}
            if self.config.kv_lora_rank is None
            else {"position_embeddings_mla": self.rotary_emb_mla(x, position_ids)}
        )
        states, routers = [x], []
        for layer in self.layers[: self.config.num_hidden_layers]:
            outputs = layer(states[-1], **options, **mla)
            states.append(outputs[0])
            routers += [outputs[-1]] if output_router_logits and outputs[-1] is not None else []
        states[-1] = last = self.norm(states[-1])
        further = []
        for layer in self.layers[self.config.num_hidden_layers :] if self.training else []:
            input_ids = torch.roll(input_ids, -1, 1).index_fill(1, torch.tensor([tokens - 1]), 0)
            further.append(layer(self.word_embeddings(input_ids), further[-1] if further else last, **options)[0])
        return BailingOutput(
            last_hidden_state=last,
            hidden_states=tuple(states) if output_hidden_states else None,
            router_logits=tuple(routers) if output_router_logits else None,
            mtp_hidden_states=further or None,
        )


class BailingMoeV2_5Model(BailingMoeV2Model):
    pass


class BailingMoeLinearV2ForCausalLM(BailingPreTrainedModel, GenerationMixin):
    base_class = BailingMoeV2Model

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.base_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, output_router_logits=None,
        return_dict=None, **kwargs,
    ):  # fmt: skip
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits, return_dict=True, **kwargs,
        )  # fmt: skip
        logits, loss = self.lm_head(outputs[0]).float(), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
            if self.config.num_nextn_predict_layers and outputs.mtp_hidden_states is not None:
                for i, states in enumerate(outputs.mtp_hidden_states):
                    shifted = torch.roll(labels, -1 - i, 1)
                    shifted[:, -1 - i :] = -100
                    further = self.loss_function(self.lm_head(states).float(), shifted, self.config.vocab_size)
                    loss = loss + self.config.mtp_loss_scaling_factor * further
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions, router_logits=outputs.router_logits,
        )  # fmt: skip


class BailingMoeV2_5ForCausalLM(BailingMoeLinearV2ForCausalLM):
    base_class = BailingMoeV2_5Model
