"""TransNormerLLM in plain PyTorch: class, parameter and argument names as in OpenNLPLab's remote code.

Written from the definition in Qin et al., "TransNormerLLM" (arXiv 2307.14995), with names and signatures of
`modeling_transnormer.py` in the repositories OpenNLPLab/TransNormerLLM-385M, -1B and -7B. The linear attention is the
full matrix; there is no cache: a forward with one raises. As published, the config counts layers by a name of its own,
slopes are a plain tensor on the base model, and embeddings that are passed in are not scaled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .plain import alibi_slopes, decayed_attention

ACTIVATIONS = {"silu": F.silu, "1+elu": lambda x: 1 + F.elu(x)}


class TransnormerConfig(PreTrainedConfig):
    model_type = "transnormer_stand_in"

    def __init__(
        self, pad_token_id=None, bos_token_id=None, eos_token_id=None, vocab_size=128, use_cache=True, init_std=0.2,
        decoder_embed_dim=32, decoder_layers=3, decoder_attention_heads=4, no_scale_embedding=False,
        norm_type="simplermsnorm", linear_use_lrpe_list=(True, False, True), hidden_dim=32, linear_act_fun="silu",
        glu_dim=40, bias=False, **kwargs,
    ) -> None:  # fmt: skip
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        for name, value in own.items():
            setattr(self, name, value)
        tokens = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        super().__init__(**tokens, **{"tie_word_embeddings": False} | kwargs)


class SimpleRMSNorm(nn.Module):
    """Without a weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()).to(x)


def norm_of(config: Any) -> Any:
    return SimpleRMSNorm if config.norm_type == "simplermsnorm" else nn.LayerNorm


class Lrpe(nn.Module):
    """x [B, H, T, D] to [x cos, x sin] of angles position * theta, which is trained."""

    def __init__(self, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        every = num_heads * embed_dim
        theta = 10000 ** (-2 / every * torch.arange(every))
        self.theta = nn.Parameter(theta.reshape(num_heads, 1, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        angles = self.theta * torch.arange(x.shape[-2])[:, None]
        return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)


class GLU(nn.Module):
    def __init__(self, d1: int, d2: int, bias: bool) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(d1, d2, bias=bias), nn.Linear(d1, d2, bias=bias)
        self.l3 = nn.Linear(d2, d1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


class NormLinearAttention(nn.Module):
    def __init__(self, config: Any, linear_use_lrpe: bool) -> None:
        super().__init__()
        self.num_heads, self.embed_dim = config.decoder_attention_heads, config.decoder_embed_dim
        self.head_dim = self.embed_dim // self.num_heads
        self.out_proj = nn.Linear(config.hidden_dim, self.embed_dim, bias=config.bias)
        self.act = ACTIVATIONS[config.linear_act_fun]
        self.norm = norm_of(config)(config.hidden_dim)
        self.linear_use_lrpe = linear_use_lrpe
        if linear_use_lrpe:
            self.lrpe = Lrpe(self.num_heads, self.head_dim)
        self.qkvu_proj = nn.Linear(self.embed_dim, 4 * config.hidden_dim, bias=config.bias)
        self.offset = 0

    def forward(
        self, x, attn_mask=None, attn_padding_mask=None, output_attentions=False, past_key_value=None, use_cache=False,
        slope_rate=None,
    ):  # fmt: skip
        assert past_key_value is None and not use_cache and not output_attentions
        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.act(q), self.act(k)
        if self.linear_use_lrpe:
            q, k = self.lrpe(q), self.lrpe(k)
        o = decayed_attention(q, k, v, slope_rate.flatten(), 1.0).transpose(1, 2).flatten(-2)
        return self.out_proj(u * self.norm(o)), None, None


class TransnormerDecoderLayer(nn.Module):
    def __init__(self, config: Any, linear_use_lrpe: bool) -> None:
        super().__init__()
        self.token_norm = norm_of(config)(config.decoder_embed_dim)
        self.channel_norm = norm_of(config)(config.decoder_embed_dim)
        self.token_mixer = NormLinearAttention(config, linear_use_lrpe)
        self.channel_mixer = GLU(config.decoder_embed_dim, config.glu_dim, config.bias)

    def forward(
        self, x, attn_mask=None, attn_padding_mask=None, past_key_value=None, output_attentions=False, use_cache=False,
        slope_rate=None,
    ):  # fmt: skip
        mixed, weights, present = self.token_mixer(
            x=self.token_norm(x), attn_mask=attn_mask, attn_padding_mask=attn_padding_mask,
            past_key_value=past_key_value, output_attentions=output_attentions, use_cache=use_cache,
            slope_rate=slope_rate,
        )  # fmt: skip
        x = x + mixed
        x = x + self.channel_mixer(self.channel_norm(x))
        return (x, *((weights,) if output_attentions else ()), *((present,) if use_cache else ()))


class TransnormerPreTrainedModel(PreTrainedModel):
    config_class = TransnormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TransnormerDecoderLayer",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)

    def _set_gradient_checkpointing(self, module, value=False):
        if isinstance(module, TransnormerModel):
            module.gradient_checkpointing = value


class TransnormerModel(TransnormerPreTrainedModel):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.num_layers, heads = config.decoder_layers, config.decoder_attention_heads
        self.slopes = torch.tensor(alibi_slopes(heads)).reshape(heads, 1, 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim, config.pad_token_id)
        lrpe = list(config.linear_use_lrpe_list)[: self.num_layers]
        self.layers = nn.ModuleList([TransnormerDecoderLayer(config, bool(use)) for use in lrpe])
        self.final_norm = norm_of(config)(config.decoder_embed_dim)
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(
        self, input_ids=None, attn_padding_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None,
        output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        assert past_key_values is None and not use_cache and not output_attentions
        assert attn_padding_mask is None or bool(attn_padding_mask.all())
        x = self.embed_scale * self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        states = [x]
        for index, layer in enumerate(self.layers):
            slopes = self.slopes.to(x.device) * (1 - index / (self.num_layers - 1) + 1e-5)
            states.append(layer(states[-1], slope_rate=slopes)[0])
        states[-1] = self.final_norm(states[-1])
        recorded = tuple(states) if output_hidden_states else None
        if not (self.config.return_dict if return_dict is None else return_dict):
            return tuple(value for value in (states[-1], recorded) if value is not None)
        return BaseModelOutputWithPast(last_hidden_state=states[-1], hidden_states=recorded)


class TransnormerForCausalLM(TransnormerPreTrainedModel, GenerationMixin):
    """With GenerationMixin as transformers adds it to remote code."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TransnormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def get_decoder(self):
        return self.model

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, labels=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ):  # fmt: skip
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.model(
            input_ids=input_ids, attn_padding_mask=attention_mask, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=return_dict,
        )  # fmt: skip
        logits, loss = self.lm_head(outputs[0]), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if not return_dict:
            return (logits, *outputs[1:]) if loss is None else (loss, logits, *outputs[1:])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )  # fmt: skip

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        if past_key_values:
            input_ids = input_ids[:, -1:]
        if inputs_embeds is not None and past_key_values is None:
            inputs = {"inputs_embeds": inputs_embeds}
        else:
            inputs = {"input_ids": input_ids}
        return inputs | {
            "past_key_values": past_key_values, "use_cache": kwargs.get("use_cache"), "attention_mask": attention_mask
        }  # fmt: skip

    @staticmethod
    def _reorder_cache(past_key_values, beam_idx):
        raise NotImplementedError("the published one takes states for tuples")
