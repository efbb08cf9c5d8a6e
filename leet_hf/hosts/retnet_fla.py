"""Forwards of FLA's RetNet: base model, retention, and language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..host import prepare, real_positions
from ..packing import sequence_positions
from ..retnet.positions import rotary_angles, rotary_tables
from ..versions import CACHE, cache_argument, merge_with_config_defaults
from .remote import Context, Record, attend_in, context, given_or, kinds_of, local_mask, positions_alone, run_layer


@merge_with_config_defaults
def fla_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """What the host's base model does, with a DynamicCache or StaticCache, and with packed sequences.

    Arguments as in the host. Besides: `position_ids` [B, T] (default: pads are not counted) and `cache`, another name
    of `past_key_values`. Packed sequences by `cu_seqlens`, the host's name, or by the names of transformers. Where
    attentions are asked for, each is the state [B, H, K, V] of its layer. Raises ValueError as `leet_hf.host.prepare`.
    """
    past = cache_argument(past_key_values, cache)
    if kwargs.get("cu_seqlens") is not None and kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError("cu_seqlens and cu_seq_lens_q are two names of one argument: give only one")
    bounds = kwargs.pop("cu_seqlens", None)
    if bounds is not None:
        kwargs["cu_seq_lens_q"] = bounds
    tokens = input_ids if input_ids is not None else inputs_embeds
    if position_ids is None and tokens is not None:
        position_ids = real_positions(attention_mask, tokens.shape[1], past)
    kinds = kinds_of(self._leet.spec, self.config.num_hidden_layers)
    ready = prepare(
        self, kinds, self.embeddings, input_ids, attention_mask, position_ids, past, inputs_embeds, use_cache, kwargs
    )
    record = Record.of(self.config, output_hidden_states, output_attentions)
    hidden_states = ready.hidden_states
    positions = sequence_positions(ready.position_ids, ready.arguments.get("seq_idx"))
    given = context(ready, _tables(self.layers[0].attn, positions, hidden_states))
    for layer, _ in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit
        record.add_hidden(hidden_states)
        outputs = run_layer(
            self, layer, hidden_states, attention_mask=given, past_key_values=ready.cache, use_cache=bool(use_cache),
            output_attentions=record.asked["attentions"],
        )  # fmt: skip
        hidden_states = outputs[0]
        record.add(outputs)
    hidden_states = self.norm(hidden_states)
    record.add_hidden(hidden_states)
    output = BaseModelOutputWithPast(
        last_hidden_state=hidden_states,
        hidden_states=record.hidden_states,
        attentions=record.attentions,
        **{CACHE: ready.cache},
    )
    return given_or(self.config, return_dict, output)


def fla_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a retention. Returns its output, its state if attentions are asked for, the cache.

    attention_mask: a Context from the base forward, or a mask [B, past + T] where the block is called alone.
    """
    past = cache_argument(past_key_values, cache)
    given = attention_mask
    if not isinstance(given, Context):
        positions = positions_alone(self, hidden_states, past)
        given = Context(_tables(self, positions, hidden_states), local_mask(attention_mask, hidden_states))
    output, state = attend_in(self, hidden_states, given, None, past, bool(output_attentions))
    return output, state, past


def fla_head_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    inputs_embeds: Tensor | None = None,
    past_key_values: Any = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    position_ids: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """The host's own, which says that it takes `position_ids` and `cache`: generate() looks at the signature."""
    return type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        past_key_values=cache_argument(past_key_values, cache),
        labels=labels,
        use_cache=use_cache,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        return_dict=return_dict,
        logits_to_keep=logits_to_keep,
        position_ids=position_ids,
        **kwargs,
    )


def _tables(layer: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of FLA's rotary module, by its formula: its buffer may have been cast, its tables are grown on use."""
    angles = rotary_angles(layer.rotary.dim, layer.rotary.base, "rope", like.device)
    return rotary_tables(positions, angles, torch.promote_types(like.dtype, torch.float32))
