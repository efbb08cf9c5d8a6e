"""Forwards of FLA's RetNet: base model, retention, softmax attention, and language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..fused.rotary import turned
from ..host import LINEAR, SOFTMAX, Prepared, prepare, real_positions
from ..packing import sequence_positions
from ..retnet.positions import rotary_angles, rotary_tables
from ..versions import cache_argument, merge_with_config_defaults
from .remote import Context, Record, attend_in, bounds_of, context, kinds_of, local_mask, positions_alone, run_layer
from .softmax import eager_attention


class SoftmaxPlace(NamedTuple):
    """What a softmax layer needs of a forward, in the place of the mask. mask: what the attention function takes.

    positions [B, T] (B may be 1). implementation: of the attention. bounds: of packed sequences, for flash attention.
    """

    mask: Any
    positions: Tensor
    implementation: str
    bounds: dict[str, Any]


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
    attentions are asked for, that of a retention is its state [B, H, K, V]. Raises ValueError as
    `leet_hf.host.prepare`.
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
    given = _given(self, ready, positions)
    for layer, kind in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit
        record.add_hidden(hidden_states)
        outputs = run_layer(
            self, layer, hidden_states, attention_mask=given[kind], past_key_values=ready.cache,
            use_cache=bool(use_cache), output_attentions=record.asked["attentions"],
        )  # fmt: skip
        hidden_states = outputs[0]
        record.add(outputs)
    hidden_states = self.norm(hidden_states)
    record.add_hidden(hidden_states)
    return record.output(BaseModelOutputWithPast, hidden_states, ready, self.config, return_dict)


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


def fla_softmax_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    past_key_values: Any = None,
    output_attentions: bool | None = False,
    use_cache: bool | None = False,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a softmax layer. Returns its output, its weights if asked for and made, and the cache.

    attention_mask: a SoftmaxPlace from the base forward, or None where the block is called alone; ValueError otherwise.
    """
    past = cache_argument(past_key_values, cache)
    given = attention_mask
    if not isinstance(given, SoftmaxPlace):
        if attention_mask is not None:
            raise ValueError("attention_mask was given to a softmax layer alone: call the model, which makes masks")
        given = SoftmaxPlace(None, positions_alone(self, hidden_states, past), "sdpa", {})
    q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
    if getattr(self, "qk_norm", False):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = turned(q, k, *_tables(self, given.positions, hidden_states))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if past is not None:
        k, v = past.update(k, v, self._leet.index)
    k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(given.implementation, eager_attention)
    o, weights = attend(self, q, k, v, given.mask, dropout=0.0, scaling=self.head_dim**-0.5, **given.bounds)
    return self.o_proj(o.flatten(-2)), weights if output_attentions else None, past


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


def _given(base: Any, ready: Prepared, positions: Tensor) -> dict[str, Any]:
    """What layers of each kind get in the place of the mask."""
    retention = next(block.attn for block in base.layers if hasattr(block.attn, "head_k_dim"))
    mask = ready.masks.get(SOFTMAX)
    return {
        LINEAR: context(ready, _tables(retention, positions, ready.hidden_states)),
        SOFTMAX: SoftmaxPlace(mask, positions, base.config._attn_implementation, bounds_of(ready)),
    }


def _tables(layer: Any, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of FLA's rotary module, by its formula: its buffer may have been cast, its tables are grown on use."""
    angles = rotary_angles(layer.rotary.dim, layer.rotary.base, "rope", like.device)
    return rotary_tables(positions, angles, torch.promote_types(like.dtype, torch.float32))
