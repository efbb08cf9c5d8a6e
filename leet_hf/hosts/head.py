"""Models that generate, in remote code written for older versions of transformers: what stands before their forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationMixin

from ..versions import cache_argument
from .remote import BOUNDS

PACKING = ("seq_idx", *BOUNDS)


class Handed(NamedTuple):
    """A cache with arguments that a model's own forward does not know, on the way to its base model."""

    cache: Any
    arguments: dict[str, Any]


def taken(past: Any, arguments: dict[str, Any]) -> Any:
    """The cache in what a base model was given as one; what was handed on with it is put into `arguments`."""
    if isinstance(past, Handed):
        arguments.update(past.arguments)
        return past.cache
    return past


def head_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    logits_to_keep: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """The model's own forward, with the cache by either of its names, and with packed sequences."""
    named = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache, "return_dict": return_dict,
        "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        "logits_to_keep": logits_to_keep,
    }  # fmt: skip
    return own_forward(self, named | kwargs, cache_argument(past_key_values, cache))


def strict_head_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    output_router_logits: bool | None = None,
    return_dict: bool | None = None,
    cache: Any = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
) -> Any:
    """As `head_forward`, for a model whose own takes no further arguments, which a Trainer looks for."""
    named = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "inputs_embeds": inputs_embeds, "labels": labels, "use_cache": use_cache, "return_dict": return_dict,
        "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        "output_router_logits": output_router_logits, "seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q,
        "cu_seq_lens_k": cu_seq_lens_k, "max_length_q": max_length_q, "max_length_k": max_length_k,
    }  # fmt: skip
    return own_forward(self, named, cache_argument(past_key_values, cache))


def own_forward(model: Any, arguments: dict[str, Any], past: Any, handed: Sequence[str] = PACKING) -> Any:
    """Call the forward of the model's class. handed: which arguments it does not know; they go with the cache."""
    apart = {name: value for name in handed if (value := arguments.pop(name, None)) is not None}
    given = {name: value for name, value in arguments.items() if value is not None}
    return type(model).forward(model, past_key_values=Handed(past, apart) if apart else past, **given)


def _reorder_cache(model: Any, cache: Any, beam_idx: Tensor) -> Any:
    cache.reorder_cache(beam_idx)
    return cache


# Methods of such a model that patching replaces; its own ones are for tuples of states.
HEAD_METHODS: dict[str, Callable[..., Any]] = {
    "forward": head_forward,
    "prepare_inputs_for_generation": GenerationMixin.prepare_inputs_for_generation,
    "_reorder_cache": _reorder_cache,
}
STRICT_HEAD_METHODS = HEAD_METHODS | {"forward": strict_head_forward}
