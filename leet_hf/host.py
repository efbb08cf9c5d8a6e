"""The forward of a host's base model, with standard caches: embeddings, masks, packing, decoder layers, norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from .decoding import through_graphs
from .packing import Packing, find_packing, packing_arguments
from .shapes import CacheSpec
from .upgrade import new_cache, recurrent_layers, seen_tokens, upgrade
from .versions import (
    CACHE,
    cache_argument,
    capture_outputs,
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    merge_with_config_defaults,
)

if TYPE_CHECKING:
    from .adapters.base import Adapter

LINEAR, SOFTMAX = "linear_attention", "full_attention"


@dataclass
class HostBinding:
    """What patching puts on a base model: the adapter, the shapes its caches need, and how to take it off again."""

    adapter: Adapter
    spec: CacheSpec
    had_entry: bool = False


@dataclass
class Prepared:
    """What the decoder layers of a base model are called with, once cache, packing and masks are settled.

    hidden_states: the embeddings [B, T, hidden]. masks: by kind of layer. cache: with recurrent layers, or None.
    arguments: the caller's other ones, with `seq_idx` and `cu_seq_lens_q` where sequences are packed.
    """

    hidden_states: Tensor
    position_ids: Tensor
    masks: dict[str, Any]
    cache: Any
    arguments: dict[str, Any]


def prepare(
    base: Any,
    layer_types: list[str],
    embed: Callable[[Tensor], Tensor],
    input_ids: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    inputs_embeds: Tensor | None,
    use_cache: bool | None,
    arguments: dict[str, Any],
) -> Prepared:
    """The first half of a base model's forward, whatever its family: embeddings, cache, packing, positions, masks.

    base: has `config` and the binding `_leet`, whose spec says which layers are recurrent. layer_types: LINEAR or
    SOFTMAX for each layer that runs (fewer than the spec has: early exit). Raises ValueError for a cache of another
    kind, model or batch, and for packed sequences that can not be told apart; nothing is changed then.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids and inputs_embeds: exactly one of them must be given")
    if inputs_embeds is None:
        assert input_ids is not None
        inputs_embeds = embed(input_ids)
    batch, tokens = inputs_embeds.shape[:2]
    spec = base._leet.spec
    if cache is None and use_cache:
        cache = new_cache(base.config)
    if cache is not None:
        upgrade(cache, spec, len(layer_types))
        _check_rows(cache, batch)
    has_past = cache is not None and seen_tokens(cache, spec)

    packing, attention_mask = _packing(
        attention_mask, position_ids, arguments, batch, tokens, cache, has_past, layer_types
    )
    if position_ids is None:
        if packing is not None:
            position_ids = packing.positions
        else:
            start = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(tokens, device=inputs_embeds.device) + start)[None]
    if packing is not None:
        arguments["seq_idx"] = packing.seq_idx
    if getattr(base.config, "output_attentions", False):
        arguments.setdefault("output_attentions", True)

    if isinstance(attention_mask, dict):
        masks = attention_mask
    else:
        masks = masks_by_kind(
            base.config, inputs_embeds, attention_mask, cache, position_ids, packing, set(layer_types)
        )
    return Prepared(inputs_embeds, position_ids, masks, cache, arguments)


@through_graphs
@merge_with_config_defaults
@capture_outputs
def decoder_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | dict[str, Tensor | None] | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> MoeModelOutputWithPast:
    """What `MiniMaxModel.forward` does, with a DynamicCache or StaticCache, and with packed sequences.

    The two decorators are transformers' own: they give `use_cache` its default and record hidden states, attentions and
    router logits as on the stock model. `past_key_values` and `cache` are the names of older and newer versions of
    transformers for one argument. Raises ValueError as `prepare`; nothing is changed then.
    """
    layer_types = self.config.layer_types[: self.config.num_hidden_layers]
    past = cache_argument(past_key_values, cache)
    ready = prepare(
        self, layer_types, self.embed_tokens, input_ids, attention_mask, position_ids, past, inputs_embeds,
        use_cache, kwargs,
    )  # fmt: skip
    hidden_states = ready.hidden_states
    position_embeddings = self.rotary_emb(hidden_states, ready.position_ids)
    for layer, kind in zip(self.layers, layer_types, strict=False):  # fewer kinds than layers: early exit
        hidden_states = layer(
            hidden_states,
            attention_mask=ready.masks[kind],
            position_embeddings=position_embeddings,
            position_ids=ready.position_ids,
            use_cache=use_cache,
            **{CACHE: ready.cache},
            **ready.arguments,
        )
    return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: ready.cache})


def real_positions(mask: Any, tokens: int, cache: Any) -> Tensor | None:
    """Positions of the last `tokens` tokens that count real ones only, [B, tokens], where a 2-D mask tells them.

    mask [B, past + tokens], 0 at pads. None where it is another mask, or one that does not cover the past.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    past = cache is not None and any(layer.has_tokens for layer in recurrent_layers(cache))
    if mask.shape[1] < tokens or (past and mask.shape[1] == tokens):
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, mask.shape[1] - tokens :]


def _check_rows(cache: Any, batch: int) -> None:
    """Before anything is written: the batch the cache is for."""
    held = next((layer.batch_size for layer in cache.layers if hasattr(layer, "batch_size")), batch)
    if held != batch:
        raise ValueError(
            f"{CACHE} holds {held} rows but the input has {batch}: use cache.batch_select_indices or "
            "cache.batch_repeat_interleave, or start from an empty cache"
        )


def _packing(
    mask: Any, position_ids: Tensor | None, arguments: dict[str, Any],
    batch: int, tokens: int, cache: Any, has_past: bool, layer_types: list[str],
) -> tuple[Packing | None, Any]:  # fmt: skip
    """How the row is packed, and the attention mask that remains: pads and packing do not go together."""
    cu_seqlens, seq_idx = packing_arguments(arguments)
    said_so = cu_seqlens is not None or seq_idx is not None
    static = cache is not None and SOFTMAX in layer_types and bool(cache.is_compileable)
    look = mask is None and not has_past and not (static and torch.compiler.is_compiling())
    packing = find_packing(cu_seqlens, seq_idx, position_ids, batch, tokens, look_at_positions=look)
    if packing is None:
        return None, mask
    if has_past:
        raise ValueError(
            f"packed sequences were given with {CACHE} that holds tokens: give the cache one sequence per row"
        )
    if static:
        raise ValueError("packed sequences were given with a StaticCache: use a DynamicCache, or use_cache=False")
    if said_so and isinstance(mask, Tensor) and mask.dim() == 2:
        if not bool(mask.all()):
            raise ValueError("attention_mask has pads and the sequences are packed: leave the pads out of the row")
        mask = None
    return packing, mask


def masks_by_kind(
    config: Any, embeds: Tensor, mask: Any, cache: Any, position_ids: Tensor | None, packing: Packing | None,
    kinds: set[str],
) -> dict[str, Any]:  # fmt: skip
    """Masks by kind of layer: 4-D (or what the attention function takes) for softmax, 2-D or None for linear."""
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": embeds,
        "attention_mask": mask,
        CACHE: cache,
        "position_ids": position_ids,
    }
    if packing is not None:
        # Transformers looks for packing in the positions, and only without a cache; ours is empty here.
        arguments |= {CACHE: None, "position_ids": packing.positions}
    masks = {}
    if SOFTMAX in kinds:
        sliding = getattr(config, "sliding_window", None) is not None
        masks[SOFTMAX] = (create_sliding_window_causal_mask if sliding else create_causal_mask)(**arguments)
    if LINEAR in kinds:
        masks[LINEAR] = _mask_of_one_token(embeds, mask)
        if masks[LINEAR] is None:
            masks[LINEAR] = create_recurrent_attention_mask(**arguments)
    return masks


def _mask_of_one_token(embeds: Tensor, mask: Any) -> Tensor | None:
    """The mask [B, 1] of a forward of one token. Transformers takes it for no pad: a prompt's last chunk may be one."""
    if embeds.shape[1] != 1 or not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling():
        return None
    last = mask[:, -1:]
    # On a GPU asking would wait for it.
    return None if last.device.type == "cpu" and bool(last.all()) else last
