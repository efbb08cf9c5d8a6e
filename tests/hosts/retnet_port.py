"""RetNet as torchscale's port to transformers has it, in plain PyTorch: modules, names and signatures of the port.

Its parts are those of `torchscale_retnet`; around them, the classes, arguments and outputs of `modeling_retnet.py` in
the repository syncdoth/RetNet. Quadratic in time, and without a cache: a forward with one raises. As published, the
config counts layers by a name of its own, and embeddings that are passed in are neither scaled nor normed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from . import torchscale_retnet as torchscale
from .torchscale_retnet import GLU, FeedForwardNetwork, RetNetRelPos, RMSNorm


class RetNetConfig(PreTrainedConfig):
    model_type = "retnet_port_stand_in"

    def __init__(
        self, vocab_size=128, initializer_range=0.2, pad_token_id=None, eos_token_id=None, bos_token_id=None,
        output_retentions=False, use_cache=True, forward_impl="parallel", activation_fn="gelu", dropout=0.0,
        decoder_embed_dim=32, decoder_value_embed_dim=48, decoder_ffn_embed_dim=40, decoder_layers=3,
        decoder_retention_heads=4, decoder_normalize_before=True, layernorm_embedding=False, no_scale_embedding=True,
        recurrent_chunk_size=512, use_glu=True, use_lm_decay=False, deepnorm=False, subln=True, use_ffn_rms_norm=False,
        layernorm_eps=1e-6, tie_word_embeddings=False, **kwargs,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        if deepnorm:
            self.decoder_normalize_before = self.subln = False
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**tokens, tie_word_embeddings=tie_word_embeddings, **kwargs)


class MultiScaleRetention(torchscale.MultiScaleRetention):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config, self.num_heads = config, config.decoder_retention_heads
        self.head_dim = config.decoder_value_embed_dim // self.num_heads
        self.key_dim = config.decoder_embed_dim // self.num_heads
        self.scaling, self.gate_fn = self.key_dim**-0.5, F.silu

    def forward(
        self, hidden_states, rel_pos, retention_mask=None, past_key_value=None, forward_impl="parallel",
        output_retentions=False,
    ):  # fmt: skip
        assert retention_mask is None and past_key_value is None and forward_impl == "parallel"
        assert not output_retentions
        return super().forward(hidden_states, rel_pos), None


class RetNetDecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.normalize_before = config.decoder_normalize_before
        self.alpha = math.pow(2.0 * config.decoder_layers, 0.25) if config.deepnorm else 1.0
        self.dropout_module = nn.Dropout(config.dropout)
        self.retention = MultiScaleRetention(config)
        self.retention_layer_norm = RMSNorm(config.decoder_embed_dim, config.layernorm_eps)
        self.ffn = (GLU if config.use_glu else FeedForwardNetwork)(config)
        self.final_layer_norm = RMSNorm(config.decoder_embed_dim, config.layernorm_eps)

    def forward(
        self, hidden_states, retention_rel_pos, retention_mask=None, forward_impl="parallel", past_key_value=None,
        output_retentions=False,
    ):  # fmt: skip
        before, x = self.normalize_before, hidden_states
        mixed, state, *weights = self.retention(
            self.retention_layer_norm(x) if before else x, retention_rel_pos, retention_mask=retention_mask,
            past_key_value=past_key_value, forward_impl=forward_impl, output_retentions=output_retentions,
        )  # fmt: skip
        x = self.alpha * x + self.dropout_module(mixed)
        x = x if before else self.retention_layer_norm(x)
        x = self.alpha * x + self.ffn(self.final_layer_norm(x) if before else x)
        return x if before else self.final_layer_norm(x), state, *weights


class RetNetPreTrainedModel(PreTrainedModel):
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RetNetDecoderLayer",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, RetNetModel):
            module.gradient_checkpointing = value


class RetNetModel(RetNetPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        dim, eps = config.decoder_embed_dim, config.layernorm_eps
        self.dropout_module = nn.Dropout(config.dropout)
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.layernorm_embedding = RMSNorm(dim, eps) if config.layernorm_embedding else None
        self.layers = nn.ModuleList([RetNetDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.layer_norm = RMSNorm(dim, eps) if config.decoder_normalize_before else None
        self.retnet_rel_pos = RetNetRelPos(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward_embedding(self, input_ids, forward_impl, inputs_embeds=None, past_key_values=None):
        x = self.embed_scale * (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        return self.dropout_module(x if self.layernorm_embedding is None else self.layernorm_embedding(x))

    def forward(
        self, input_ids=None, retention_mask=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        output_retentions=None, output_attentions=None, output_hidden_states=None, use_cache=None, return_dict=None,
        forward_impl="parallel", recurrent_chunk_size=None,
    ):  # fmt: skip
        mask = attention_mask if retention_mask is None else retention_mask
        assert past_key_values is None and not use_cache and not output_retentions and not output_attentions
        assert mask is None or bool(mask.all())
        x = self.forward_embedding(input_ids, forward_impl) if inputs_embeds is None else inputs_embeds
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], self.retnet_rel_pos, forward_impl=forward_impl)[0])
        states[-1] = states[-1] if self.layer_norm is None else self.layer_norm(states[-1])
        recorded = tuple(states) if output_hidden_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in (states[-1], recorded) if value is not None)
        return BaseModelOutputWithPast(last_hidden_state=states[-1], hidden_states=recorded)


class RetNetForCausalLM(RetNetPreTrainedModel, GenerationMixin):
    """With GenerationMixin as transformers adds it to remote code."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, retention_mask=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_retentions=None, output_attentions=None, output_hidden_states=None,
        return_dict=None, forward_impl=None, recurrent_chunk_size=None,
    ):  # fmt: skip
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids, retention_mask=attention_mask if retention_mask is None else retention_mask,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            output_retentions=output_attentions if output_retentions is None else output_retentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict,
            forward_impl=self.config.forward_impl if forward_impl is None else forward_impl,
        )  # fmt: skip
        logits, loss = self.lm_head(outputs[0]), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            return (logits, *outputs[1:]) if loss is None else (loss, logits, *outputs[1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if inputs_embeds is not None and past_key_values is None:
            inputs = {"inputs_embeds": inputs_embeds}
        else:
            inputs = {"input_ids": input_ids}
        return inputs | {
            "past_key_values": past_key_values, "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask,
            "forward_impl": "parallel" if past_key_values is None else "recurrent",
        }  # fmt: skip


def steps_of_the_port(model: Any, tokens: Tensor, count: int) -> Tensor:
    """As the port's own `custom_generate`: the prompt in parallel, then all tokens so far with forward_impl recurrent,
    of which the model takes the last."""
    cache = model(tokens[:, :-1], forward_impl="parallel", use_cache=True, return_dict=True).past_key_values
    for _ in range(count):
        outputs = model(tokens, forward_impl="recurrent", past_key_values=cache, use_cache=True, return_dict=True)
        cache = outputs.past_key_values
        tokens = torch.cat([tokens, outputs.logits[:, -1:].argmax(-1)], dim=1)
    return tokens
