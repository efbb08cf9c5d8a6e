"""Forwards of Ring / Ling linear (`BailingMoeV2...`, `BailingMoeV2_5...`): base model and linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from ..host import LINEAR, Prepared, prepare
from ..versions import cache_argument, merge_with_config_defaults
from .remote import Record, attend_in, bounds_of, context, kinds_of, run_layer


@dataclass
class BailingModelOutput(MoeModelOutputWithPast):
    """With `mtp_hidden_states`, the list of what the layers that predict further tokens gave, or None."""

    mtp_hidden_states: list[Tensor] | None = None


@merge_with_config_defaults
def bailing_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | dict[str, Tensor | None] | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    cache_position: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_router_logits: bool | None = None,
    return_dict: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """What the host's base model does, with a DynamicCache or StaticCache, and with packed sequences.

    Arguments as in the host, `cache_position` unread; `past_key_values` and `cache` are two names of one argument.
    Layers that predict further tokens (`num_nextn_predict_layers`) run in training alone, as in the host. The attention
    of a recurrent layer, where attentions are asked for, is its state [B, H, K, V]. Raises ValueError as
    `leet_hf.host.prepare`, and for training such layers without input_ids.
    """
    further = self.layers[len(self._leet.spec) :] if self.training else []
    if len(further) and input_ids is None:
        raise ValueError("input_ids is None: layers that predict further tokens are trained on tokens, not embeddings")
    kinds = kinds_of(self._leet.spec, self.config.num_hidden_layers)
    ready = prepare(
        self, kinds, self.word_embeddings, input_ids, attention_mask, position_ids,
        cache_argument(past_key_values, cache), inputs_embeds, use_cache, kwargs,
    )  # fmt: skip
    record = Record.of(self.config, output_hidden_states, output_attentions, output_router_logits)
    embeddings = self.rotary_emb(ready.hidden_states, ready.position_ids)
    options = {
        "position_ids": ready.position_ids,
        "output_attentions": record.asked["attentions"],
        "output_router_logits": record.asked["router_logits"],
        "use_cache": bool(use_cache),
    }
    hidden_states = ready.hidden_states
    for layer, kind in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit, further tokens
        record.add_hidden(hidden_states)
        own = _linear(ready, embeddings) if kind == LINEAR else _softmax(self, ready, embeddings)
        outputs = run_layer(self, layer, hidden_states, past_key_value=ready.cache, **options, **own)
        hidden_states = outputs[0]
        record.add(outputs)
    hidden_states = self.norm(hidden_states)
    record.add_hidden(hidden_states)

    predicted = None
    if len(further):
        predicted = _predict_further(self, further, input_ids, hidden_states, ready, embeddings, options, record)
    more = {"router_logits": record.router_logits, "mtp_hidden_states": predicted}
    return record.output(BailingModelOutput, hidden_states, ready, self.config, return_dict, **more)


def bailing_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a linear attention. Returns its output, its state if attentions are asked for, the cache.

    position_embeddings: a Context from the base forward, or (cos, sin) where the decoder layer is called alone.
    """
    past = past_key_value if past_key_value is not None else cache_argument(past_key_values, cache)
    output, state = attend_in(self, hidden_states, position_embeddings, attention_mask, past, bool(output_attentions))
    return output, state, past


def _linear(ready: Prepared, embeddings: Any) -> dict[str, Any]:
    return {"attention_mask": None, "position_embeddings": context(ready, embeddings)}


def _softmax(base: Any, ready: Prepared, embeddings: Any) -> dict[str, Any]:
    """Latent attention (2.5) has a rope of its own; the bounds of packed sequences are for flash attention."""
    own: dict[str, Any] = {"attention_mask": ready.masks["full_attention"], "position_embeddings": embeddings}
    if hasattr(base, "rotary_emb_mla"):
        own["position_embeddings_mla"] = base.rotary_emb_mla(ready.hidden_states, ready.position_ids)
    return own | bounds_of(ready)


def _predict_further(
    base: Any, layers: Any, tokens: Any, hidden_states: Tensor, ready: Prepared, embeddings: Any,
    options: dict[str, Any], record: Record,
) -> list[Tensor]:  # fmt: skip
    """Each layer sees the tokens one place further on, the last place filled with 0, and keeps no cache."""
    predicted = []
    for layer in layers:
        tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
        outputs = run_layer(
            base, layer, base.word_embeddings(tokens), hidden_states=hidden_states, past_key_value=None,
            attention_mask=ready.masks.get("full_attention"), position_embeddings=embeddings, **options,
        )  # fmt: skip
        hidden_states = outputs[0]
        predicted.append(hidden_states)
        record.add_hidden(hidden_states)
        record.add(outputs)
    return predicted
