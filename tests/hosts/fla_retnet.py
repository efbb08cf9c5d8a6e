"""RetNet as flash-linear-attention (FLA) has it, in plain PyTorch: config, blocks, models.

Names, signatures and outputs of `fla.models.retnet` in the package flash-linear-attention 0.6.0; the layers are in
`fla_layers`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .fla_layers import Attention, Cache, GatedMLP, MultiScaleRetention, RMSNorm


class RetNetConfig(PreTrainedConfig):
    model_type = "retnet"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        attn_mode: str = "chunk",
        hidden_size: int = 2048,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        hidden_ratio: int | None = 2,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 24,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        hidden_act: str = "swish",
        use_output_gate: bool = True,
        max_position_embeddings: int = 2048,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        attn: dict[str, Any] | None = None,
        use_cache: bool = True,
        initializer_range: float = 0.02,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(
            pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings, **kwargs,
        )  # fmt: skip


class RetNetBlock(GradientCheckpointingLayer):
    def __init__(self, config: RetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        norm = RMSNorm if config.fuse_norm else nn.RMSNorm
        self.attn_norm = norm(config.hidden_size, eps=config.norm_eps)
        softmax = dict(config.attn or {})
        if layer_idx in softmax.pop("layers", ()):
            self.attn: nn.Module = Attention(config.hidden_size, layer_idx=layer_idx, **softmax)
        else:
            self.attn = MultiScaleRetention(
                config.attn_mode, config.hidden_size, config.expand_k, config.expand_v, config.num_heads,
                config.num_kv_heads, config.feature_map, config.use_output_gate, config.hidden_act,
                config.elementwise_affine, config.norm_eps, config.fuse_norm, layer_idx,
            )  # fmt: skip
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.hidden_ratio, config.intermediate_size)
        self.use_attnres = config.attnres_block_size is not None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        attnres_states: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        residual = hidden_states
        hidden_states, attentions, past_key_values = self.attn(
            hidden_states=self.attn_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            **kwargs,
        )
        if self.config.fuse_norm:
            hidden_states, residual = self.mlp_norm(hidden_states, residual, True)
        else:
            residual = residual + hidden_states
            hidden_states = self.mlp_norm(residual)
        return residual + self.mlp(hidden_states, **kwargs), attentions, past_key_values, attnres_states


class RetNetPreTrainedModel(PreTrainedModel):
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RetNetBlock",)
    _supports_cache_class = True
    _is_stateful = True
    _input_embed_layer = "embeddings"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class RetNetModel(RetNetPreTrainedModel):
    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([RetNetBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = (RMSNorm if config.fuse_norm else nn.RMSNorm)(config.hidden_size, eps=config.norm_eps)
        self.use_attnres = config.attnres_block_size is not None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You have to specify either input_ids or inputs_embeds")
        hidden_states = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and not isinstance(past_key_values, Cache):
            past_key_values = Cache()
        all_hidden_states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            all_hidden_states += (hidden_states,)
            hidden_states, _, past_key_values, _ = layer(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                attnres_states=None,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        recorded = (*all_hidden_states, hidden_states) if output_hidden_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(x for x in (hidden_states, past_key_values, recorded) if x is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states, past_key_values=past_key_values, hidden_states=recorded
        )


class FLAUnsupportedCacheGenerationMixin(GenerationMixin):
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: Any = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if logits_to_keep is not None:
            kwargs["logits_to_keep"] = logits_to_keep
        return super().prepare_inputs_for_generation(
            input_ids=input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values,
            attention_mask=attention_mask, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration,
            use_cache=use_cache, **kwargs,
        )  # fmt: skip


class RetNetForCausalLM(RetNetPreTrainedModel, FLAUnsupportedCacheGenerationMixin):
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}  # type: ignore[misc]

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.criterion = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        **kwargs: Any,
    ) -> Any:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )
        hidden_states = outputs[0]
        if labels is None and isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits, loss = self.lm_head(hidden_states), None
        if labels is not None:
            shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        if not return_dict:
            return (logits, *outputs[1:]) if loss is None else (loss, logits, *outputs[1:])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip
