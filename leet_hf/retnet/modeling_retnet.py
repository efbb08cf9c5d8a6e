"""RetNet as a Transformers model: base model, causal language model, sequence classifier."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from ..decoding import through_graphs
from ..fused.loss import install_loss
from ..generation import GenerationBinding, RecurrentGeneration
from ..host import HostBinding, prepare, real_positions
from ..packing import sequence_positions
from ..versions import CACHE, cache_argument, cache_of, capture_outputs, merge_with_config_defaults
from .adapter import RetNetAdapter
from .attention import RetNetAttention
from .blocks import RetNetBlock
from .configuration_retnet import RetNetConfig
from .norms import NORMS
from .positions import Positions, decay_sums, rotary_angles, rotary_tables, softmax_tables
from .projections import ScaledLinear
from .retention import RetNetRetention

__all__ = ["RetNetForCausalLM", "RetNetForSequenceClassification", "RetNetModel", "RetNetPreTrainedModel"]


class RetNetPreTrainedModel(PreTrainedModel):
    """What all RetNet models share: how they are initialised, split, compiled and recorded."""

    config: RetNetConfig
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RetNetBlock"]  # noqa: RUF012  # transformers declares it so
    _input_embed_layer = "embeddings"
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": RetNetBlock,
        "attentions": [RetNetRetention, RetNetAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As transformers: normal, zero biases; projections that DeepNorm and Sub-LN scale by their factor."""
        super()._init_weights(module)
        if isinstance(module, ScaledLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range * self.config.init_scale)


class RetNetModel(RetNetPreTrainedModel):
    """Embeddings, decoder layers and last norm."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        norm = NORMS[config.norm_type]
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embeddings_norm = norm(config.hidden_size, config.norm_eps) if config.norm_embeddings else None
        self.layers = nn.ModuleList([RetNetBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = norm(config.hidden_size, config.norm_eps) if config.norm_first else None
        self.gradient_checkpointing = False
        adapter = RetNetAdapter()
        self._leet = HostBinding(adapter, adapter.cache_spec(self))
        self.post_init()

    @through_graphs
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch [B, T], after the tokens a cache holds.

        Args:
            input_ids [B, T] or inputs_embeds [B, T, hidden] (what the embeddings give): one of them.
            attention_mask: [B, past + T], 0 at pads, wherever they are.
            position_ids: [B, T]; default: pads are not counted. Positions that restart mean packed sequences.
            past_key_values or cache (the name from transformers 5.24 on): a DynamicCache or StaticCache.
            kwargs: `cu_seq_lens_q` [N + 1] or `seq_idx` [B, T] for packed sequences; `output_hidden_states`;
                `output_attentions` (of a retention layer, its last state [B, H, K, V]).

        Raises ValueError for both or none of the inputs, a cache of another model or batch, and packing that does not
        fit; nothing is changed then.
        """
        past = cache_argument(past_key_values, cache)
        config, layer_types = self.config, self.config.layer_types
        if position_ids is None:
            tokens = input_ids if input_ids is not None else inputs_embeds
            position_ids = None if tokens is None else real_positions(attention_mask, tokens.shape[1], past)
        ready = prepare(
            self, layer_types, self.embeddings, input_ids, attention_mask, position_ids, past, inputs_embeds,
            use_cache, kwargs,
        )  # fmt: skip
        hidden_states = self._embedded(ready.hidden_states)
        angles = rotary_angles(config.key_dim, config.rope_theta, config.position_embedding, hidden_states.device)
        cos, sin = rotary_tables(ready.position_ids, angles, hidden_states.dtype)
        counts = sequence_positions(ready.position_ids, ready.arguments.get("seq_idx"))
        shrink = self._shrink(counts, hidden_states)
        positions = Positions(cos, sin, shrink, self._softmax_tables(ready.position_ids, hidden_states))
        for layer, kind in zip(self.layers, layer_types, strict=False):  # fewer kinds than layers: early exit
            hidden_states = layer(
                hidden_states,
                position_embeddings=positions,
                attention_mask=ready.masks[kind],
                position_ids=ready.position_ids,
                use_cache=use_cache,
                **{CACHE: ready.cache},
                **ready.arguments,
            )
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: ready.cache})

    def _shrink(self, counts: Tensor, like: Tensor) -> Tensor | None:
        """What torchscale rescales outputs of retention by, at positions [B, T] of their sequences; decays are those of
        any layer."""
        if self.config.retention_scale == "none":
            return None
        decays = [layer.attn._leet.log_decay(like) for layer in self.layers if isinstance(layer.attn, RetNetRetention)]
        return decay_sums(counts, decays[0]).rsqrt() if decays and decays[0] is not None else None

    def _softmax_tables(self, position_ids: Tensor, like: Tensor) -> dict[tuple[int, float], tuple[Tensor, Tensor]]:
        """cos and sin for every kind of softmax layer, which would otherwise be made again in each of them."""
        kinds = {layer.attn.turns for layer in self.layers if isinstance(layer.attn, RetNetAttention)}
        return {kind: softmax_tables(*kind, position_ids, like) for kind in sorted(kinds)}

    def _embedded(self, embeds: Tensor) -> Tensor:
        """What torchscale does to embeddings: scale, norm, dropout, each where the config asks for it."""
        if self.config.scale_embeddings:
            embeds = embeds * math.sqrt(self.config.hidden_size)
        if self.embeddings_norm is not None:
            embeds = self.embeddings_norm(embeds)
        return nn.functional.dropout(embeds, self.config.dropout, self.training)


class RetNetForCausalLM(RetNetPreTrainedModel, RecurrentGeneration, GenerationMixin):  # type: ignore[misc]
    """RetNet with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._leet = GenerationBinding(self.model._leet.spec, ())
        self.post_init()
        install_loss(self)

    @classmethod
    def from_torchscale(cls, source: Any, *, config: Any = None, origin: str = "auto", **kwargs: Any) -> Any:
        """A model with the weights of torchscale's RetNet, or of its Hugging Face port (repository syncdoth/RetNet).

        source: a file, a directory or a state dict. config: its options, where they do not lie beside it: a dict, a
        JSON file, torchscale's RetNetConfig. origin: "torchscale", "hf-port", or "auto" to tell by the keys. kwargs: of
        `from_pretrained`, such as `dtype` and `device_map`. `leet-hf convert` writes the same model to a directory.

        Raises `leet_hf.retnet.convert.ConversionError`, a ValueError, for keys, shapes or options not as expected.
        """
        from .convert import load

        return load(cls, source, config=config, origin=origin, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab] and, with labels, the loss of predicting the next token.

        labels: [B, T], -100 where there is nothing to predict. logits_to_keep: how many of the last positions, 0 for
        all, or their indices. kwargs: of the base model, and of the loss (`num_items_in_batch`). The rest as
        `RetNetModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache_argument(past_key_values, cache)},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: cache_of(outputs)},
        )


class RetNetForSequenceClassification(GenericForSequenceClassification, RetNetPreTrainedModel):
    """RetNet with a classification head on the last token that is no pad."""
