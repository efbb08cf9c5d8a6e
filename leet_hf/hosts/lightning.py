"""The base forward of remote code with lightning attention: MiniCPM-SALA, HypeNet, MiniMax-Text-01 and M1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from ..host import LINEAR, Prepared, prepare
from ..versions import cache_argument, merge_with_config_defaults
from .head import taken
from .remote import Context, Record, attend_in, bounds_of, context, kinds_of, run_layer
from .softmax import SoftmaxContext
from .tables import places


def plain_embedding(base: Any, input_ids: Tensor) -> Tensor:
    """Token ids to embeddings, as most families have it."""
    return base.embed_tokens(input_ids)


@dataclass(frozen=True)
class Dialect:
    """How a family's base model makes embeddings and calls its decoder layers.

    embed(base, input_ids). turns(base, ready): what recurrent layers turn q and k by, or None. softmax(base, ready,
    turns, attention_mask): the arguments of softmax layers that differ from those of all layers; the mask is the
    caller's. cache_name: the argument for the cache. experts: whether decoder layers return router logits.
    """

    turns: Callable[[Any, Prepared], Any]
    softmax: Callable[[Any, Prepared, Any, Any], dict[str, Any]]
    embed: Callable[[Any, Tensor], Tensor] = plain_embedding
    cache_name: str = "past_key_value"
    experts: bool = False


def token_places(base: Any, ready: Prepared) -> Any:
    """For layers that turn q and k by tables of their own."""
    return places(ready.position_ids, ready.cache)


def softmax_in_context(base: Any, ready: Prepared, turns: Any, attention_mask: Any) -> dict[str, Any]:
    """For softmax layers with `leet_hf.hosts.softmax.softmax_forward`."""
    where = places(ready.position_ids, ready.cache) if turns is None else turns
    mask = ready.masks["full_attention"]
    return {"attention_mask": SoftmaxContext(mask, where, base.config._attn_implementation, bounds_of(ready))}


@merge_with_config_defaults
def lightning_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | dict[str, Tensor | None] | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_router_logits: bool | None = None,
    return_dict: bool | None = None,
    cache_position: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """What the host's base model does, with a DynamicCache or StaticCache, and with packed sequences.

    Arguments as in the host, `cache_position` unread; `past_key_values` and `cache` are two names of one argument. The
    attention of a recurrent layer, where attentions are asked for, is its state [B, H, K, V]. Raises ValueError as
    `leet_hf.host.prepare`.
    """
    dialect: Dialect = self._leet.adapter.dialect
    kinds = kinds_of(self._leet.spec, self.config.num_hidden_layers)
    past = taken(cache_argument(past_key_values, cache), kwargs)
    ready = prepare(
        self, kinds, lambda ids: dialect.embed(self, ids), input_ids, attention_mask, position_ids, past,
        inputs_embeds, use_cache, kwargs,
    )  # fmt: skip
    record = Record.of(self.config, output_hidden_states, output_attentions, output_router_logits)
    turns = dialect.turns(self, ready)
    linear = {"attention_mask": context(ready, turns)}
    softmax = dialect.softmax(self, ready, turns, attention_mask) if set(kinds) != {LINEAR} else {}
    options: dict[str, Any] = {
        "position_ids": ready.position_ids,
        "output_attentions": record.asked["attentions"],
        "use_cache": bool(use_cache),
        dialect.cache_name: ready.cache,
    }
    if dialect.experts:
        options["output_router_logits"] = record.asked["router_logits"]
    hidden_states = ready.hidden_states
    for layer, kind in zip(self.layers, kinds, strict=False):  # fewer kinds than layers: early exit
        record.add_hidden(hidden_states)
        outputs = run_layer(self, layer, hidden_states, **options | (linear if kind == LINEAR else softmax))
        hidden_states = outputs[0]
        record.add(outputs)
    hidden_states = self.norm(hidden_states)
    record.add_hidden(hidden_states)
    made = MoeModelOutputWithPast if dialect.experts else BaseModelOutputWithPast
    more = {"router_logits": record.router_logits} if dialect.experts else {}
    return record.output(made, hidden_states, ready, self.config, return_dict, **more)


def lightning_layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    attn_mask: Any = None,
    position_embeddings: Any = None,
    past_key_values: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """Replaces the forward of a lightning attention. Returns its output, its state if attentions are asked for, cache.

    attention_mask or attn_mask: a Context from the base forward, or a mask [B, T] where the decoder layer is called
    alone, with position_ids [B, T] or position_embeddings as the host has them.
    """
    past = past_key_value if past_key_value is not None else cache_argument(past_key_values, cache)
    given = attn_mask if attention_mask is None else attention_mask
    if not isinstance(given, Context):
        turns = places(position_ids, past) if position_embeddings is None and position_ids is not None else None
        given = Context(turns or position_embeddings, given if given is None or given.dim() == 2 else None)
    output, state = attend_in(self, hidden_states, given, None, past, bool(output_attentions))
    return output, state, past
