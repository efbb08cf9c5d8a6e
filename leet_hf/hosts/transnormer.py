"""Forwards of TransNormerLLM: base model, linear attention, and language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..host import prepare, real_positions
from ..packing import sequence_positions
from ..versions import cache_argument, merge_with_config_defaults
from .head import PACKING, own_forward, taken
from .remote import Context, Record, attend_in, context, kinds_of, local_mask, positions_alone, run_layer

HANDED = (*PACKING, "position_ids")


@merge_with_config_defaults
def transnormer_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attn_padding_mask: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    attention_mask: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """What the host's base model does, with a DynamicCache or StaticCache, and with packed sequences.

    Arguments as in the host; embeddings that are passed in are not scaled, as there. Besides: `attention_mask` and
    `cache`, other names of `attn_padding_mask` and `past_key_values`; `position_ids` [B, T] (default: pads are not
    counted); what packs sequences. Where attentions are asked for, each is the state [B, H, K, V] of its layer. Raises
    ValueError as `leet_hf.host.prepare`.
    """
    past = taken(cache_argument(past_key_values, cache), kwargs)
    mask = attn_padding_mask if attention_mask is None else attention_mask
    tokens, position_ids = input_ids if input_ids is not None else inputs_embeds, kwargs.pop("position_ids", None)
    if position_ids is None and tokens is not None:
        position_ids = real_positions(mask, tokens.shape[1], past)
    spec = self._leet.spec
    kinds = kinds_of(spec, getattr(self.config, "num_hidden_layers", len(spec)))
    ready = prepare(
        self, kinds, lambda ids: self.embed_scale * self.embed_tokens(ids), input_ids, mask, position_ids, past,
        inputs_embeds, use_cache, kwargs,
    )  # fmt: skip
    record = Record.of(self.config, output_hidden_states, output_attentions)
    given = context(ready, sequence_positions(ready.position_ids, ready.arguments.get("seq_idx")))
    hidden_states = ready.hidden_states
    for layer, _ in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit
        record.add_hidden(hidden_states)
        outputs = run_layer(
            self, layer, hidden_states, past_key_value=ready.cache, slope_rate=given,
            output_attentions=record.asked["attentions"],
        )  # fmt: skip
        hidden_states = outputs[0]
        record.add(outputs)
    hidden_states = self.final_norm(hidden_states)
    record.add_hidden(hidden_states)
    return record.output(BaseModelOutputWithPast, hidden_states, ready, self.config, return_dict)


def transnormer_layer_forward(
    self: Any,
    x: Tensor,
    attn_mask: Any = None,
    attn_padding_mask: Any = None,
    output_attentions: bool = False,
    past_key_value: Any = None,
    use_cache: bool = False,
    slope_rate: Any = None,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a linear attention. Returns its output, its state if attentions are asked for, the cache.

    slope_rate: a Context from the base forward, or the slopes, where the decoder layer is called alone; those that
    patching has read are used.
    """
    given = slope_rate
    if not isinstance(given, Context):
        given = Context(positions_alone(self, x, past_key_value), local_mask(attn_padding_mask, x))
    output, state = attend_in(self, x, given, None, past_key_value, bool(output_attentions))
    return output, state, past_key_value


def transnormer_head_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
) -> Any:
    """The model's own forward, with the cache by either of its names, positions, and packed sequences."""
    named = {
        "input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "labels": labels,
        "use_cache": use_cache, "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        "return_dict": return_dict, "position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q,
        "cu_seq_lens_k": cu_seq_lens_k, "max_length_q": max_length_q, "max_length_k": max_length_k,
    }  # fmt: skip
    return own_forward(self, named, cache_argument(past_key_values, cache), HANDED)
