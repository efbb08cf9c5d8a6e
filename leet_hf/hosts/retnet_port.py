"""Forwards of torchscale's RetNet as ported to transformers (syncdoth/RetNet): base, retention, language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..host import prepare, real_positions
from ..packing import sequence_positions
from ..retnet.positions import decay_sums, rotary_angles, rotary_tables
from ..versions import CACHE, cache_argument, cache_of, merge_with_config_defaults
from .head import HEAD_METHODS
from .remote import Context, Record, attend_in, context, given_or, kinds_of, local_mask, positions_alone, run_layer

THETA = 10000.0


class Turns(NamedTuple):
    """What the retentions of one forward share: cos and sin [B, T, 1, K / 2] (B may be 1); sums [B, T, H, 1] of the
    decay so far, 1 + gamma + ... + gamma^t."""

    cos: Tensor
    sin: Tensor
    sums: Tensor


@dataclass
class PortModelOutput(BaseModelOutputWithPast):
    """With `retentions`, the port's name of the attentions."""

    retentions: tuple[Tensor, ...] | None = None


@dataclass
class PortCausalLMOutput(CausalLMOutputWithPast):
    """With `retentions`, the port's name of the attentions."""

    retentions: tuple[Tensor, ...] | None = None


@merge_with_config_defaults
def port_forward(
    self: Any,
    input_ids: Tensor | None = None,
    retention_mask: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    output_retentions: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    forward_impl: str | None = "parallel",
    recurrent_chunk_size: int | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """What the host's base model does, with a DynamicCache or StaticCache, and with packed sequences.

    Arguments as in the host: its three forms are one here, but as there `forward_impl="recurrent"` takes the last of
    `input_ids` alone, and embeddings that are passed in are taken as they are. Besides: `position_ids` [B, T] (default:
    pads are not counted), `cache`, another name of `past_key_values`, and what packs sequences. Where retentions, or
    attentions, are asked for, each is the state of its layer, [B, H, K, V] or with more heads of fewer values, and a
    column that counts scores. Raises ValueError as `leet_hf.host.prepare`.
    """
    past = cache_argument(past_key_values, cache)
    mask = attention_mask if retention_mask is None else retention_mask
    if forward_impl == "recurrent" and input_ids is not None:
        input_ids = input_ids[:, -1:]
    tokens = input_ids if input_ids is not None else inputs_embeds
    if position_ids is not None and tokens is not None:
        position_ids = position_ids[:, -tokens.shape[1] :]
    elif tokens is not None:
        position_ids = real_positions(mask, tokens.shape[1], past)
    spec = self._leet.spec
    kinds = kinds_of(spec, getattr(self.config, "num_hidden_layers", len(spec)))
    ready = prepare(
        self, kinds, lambda ids: self.forward_embedding(ids, "parallel"), input_ids, mask, position_ids, past,
        inputs_embeds, use_cache, kwargs,
    )  # fmt: skip
    wanted = output_attentions if output_retentions is None else output_retentions
    wanted = getattr(self.config, "output_retentions", None) if wanted is None else wanted
    record = Record.of(self.config, output_hidden_states, wanted)
    hidden_states = ready.hidden_states
    counts = sequence_positions(ready.position_ids, ready.arguments.get("seq_idx"))
    given = context(ready, _turns(self.layers[0].retention, counts, hidden_states))
    for layer, _ in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit
        record.add_hidden(hidden_states)
        outputs = run_layer(
            self, layer, hidden_states, retention_rel_pos=given, past_key_value=ready.cache,
            output_retentions=record.asked["attentions"],
        )  # fmt: skip
        hidden_states = outputs[0]
        record.add((hidden_states, outputs[-1]))
    if self.layer_norm is not None:
        hidden_states = self.layer_norm(hidden_states)
    record.add_hidden(hidden_states)
    more = {"retentions": record.attentions}
    return record.output(PortModelOutput, hidden_states, ready, self.config, return_dict, **more)


def port_layer_forward(
    self: Any,
    hidden_states: Tensor,
    rel_pos: Any = None,
    retention_mask: Any = None,
    past_key_value: Any = None,
    forward_impl: str | None = "parallel",
    output_retentions: bool | None = False,
) -> tuple[Any, ...]:
    """Replaces the forward of a retention. Returns its output, the cache and, if asked for, its state.

    rel_pos: a Context from the base forward, or the host's tables where the decoder layer is called alone; its position
    in the sequence is then that of the cache.
    """
    given = rel_pos
    if not isinstance(given, Context):
        turns = _turns(self, positions_alone(self, hidden_states, past_key_value), hidden_states)
        given = Context(turns, local_mask(retention_mask, hidden_states))
    output, state = attend_in(self, hidden_states, given, None, past_key_value, bool(output_retentions))
    return (output, past_key_value, state) if output_retentions else (output, past_key_value)


def port_head_forward(
    self: Any,
    input_ids: Tensor | None = None,
    retention_mask: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_retentions: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    forward_impl: str | None = None,
    recurrent_chunk_size: int | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """As the host's, which hands on neither positions nor packing, and whose outputs newer transformers do not make.

    logits_to_keep: how many of the last positions, 0 for all, or their indices. kwargs: what packs sequences, and what
    the loss takes (`num_items_in_batch`).
    """
    outputs = self.model(
        input_ids=input_ids,
        attention_mask=attention_mask if retention_mask is None else retention_mask,
        inputs_embeds=inputs_embeds,
        output_retentions=output_retentions,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        use_cache=use_cache,
        return_dict=True,
        forward_impl=getattr(self.config, "forward_impl", None) if forward_impl is None else forward_impl,
        position_ids=position_ids,
        **{CACHE: cache_argument(past_key_values, cache)},
        **kwargs,
    )
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits, loss = self.lm_head(outputs.last_hidden_state[:, kept]), None
    if labels is not None:
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
    output = PortCausalLMOutput(
        loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
        retentions=outputs.retentions, **{CACHE: cache_of(outputs)},
    )  # fmt: skip
    return given_or(self.config, return_dict, output)


PORT_HEAD_METHODS = HEAD_METHODS | {"forward": port_head_forward}


def _turns(layer: Any, counts: Tensor, like: Tensor) -> Turns:
    """counts: positions [B, T] from the beginning of each sequence. In float32, or float64 where `like` is."""
    angles = rotary_angles(layer.key_dim, THETA, "theta_shift", like.device)
    cos, sin = rotary_tables(counts, angles, like.dtype)
    every = layer._leet.log_decay(like)
    log_decay = every[:: len(every) // layer.num_heads]  # heads of many values stand there more than once
    return Turns(cos, sin, decay_sums(counts, log_decay))
