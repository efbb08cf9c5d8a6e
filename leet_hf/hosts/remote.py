"""What the base forwards of remote code share: handing on what decoder layers drop, and recording their outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from ..host import LINEAR, SOFTMAX, Prepared
from ..layer import layer_forward
from ..shapes import CacheSpec, RecurrentShape
from ..versions import CACHE

# What says where packed sequences begin; flash attention takes it too.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Context(NamedTuple):
    """What a recurrent layer needs of a forward, in the place of an argument its decoder layer hands on unread.

    Decoder layers of remote code pass on the arguments they know: no packing, and a mask they have changed. A named
    tuple, as hooks of accelerate move the tensors in it. embeddings: what the host has in that place. mask: [B, T] or
    None. seq_idx [B, T] and cu_seqlens [N + 1]: packed sequences, as for `leet_hf.attend.attend`.
    """

    embeddings: Any = None
    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None


def context(ready: Prepared, embeddings: Any) -> Context:
    """The context of a forward's recurrent layers, with what the host has in its place."""
    packing = (ready.arguments.get(name) for name in ("seq_idx", "cu_seq_lens_q"))
    return Context(embeddings, ready.masks.get(LINEAR), *packing)


def bounds_of(ready: Prepared) -> dict[str, Any]:
    """The bounds of packed sequences a forward was given, for softmax layers."""
    return {name: ready.arguments[name] for name in BOUNDS if name in ready.arguments}


def attend_in(
    layer: nn.Module, hidden_states: Tensor, given: Any, mask: Tensor | None, cache: Any, output_attentions: bool
) -> tuple[Tensor, Tensor | None]:
    """`leet_hf.layer.layer_forward` with what stands in the context's place: a Context, or what a decoder layer that
    was called alone was given there, and the mask [B, T] it made."""
    found = given if isinstance(given, Context) else Context(given, mask if mask is None or mask.dim() == 2 else None)
    return layer_forward(
        layer, hidden_states, found.embeddings, found.mask, cache,
        seq_idx=found.seq_idx, cu_seq_lens_q=found.cu_seqlens, output_attentions=output_attentions,
    )  # fmt: skip


def positions_alone(layer: Any, hidden_states: Tensor, cache: Any) -> Tensor:
    """Positions [1, T] for a recurrent layer whose decoder layer was called alone: after the tokens its cache holds."""
    start = 0 if cache is None else cache.get_seq_length(layer._leet.index)
    return (torch.arange(hidden_states.shape[1], device=hidden_states.device) + start)[None]


def local_mask(mask: Any, hidden_states: Tensor) -> Tensor | None:
    """Of a 2-D mask [B, past + T], what is about the T tokens at hand; None for other masks."""
    return mask[:, -hidden_states.shape[1] :] if isinstance(mask, Tensor) and mask.dim() == 2 else None


def given_or(config: Any, return_dict: bool | None, output: ModelOutput) -> Any:
    """An output as asked for: as it is, or as a tuple."""
    wanted = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if wanted else output.to_tuple()


_checkpointed = functools.partial(checkpoint, use_reentrant=False)


def kinds_of(spec: CacheSpec, count: int) -> list[str]:
    """LINEAR or SOFTMAX for the first `count` layers of a spec."""
    return [LINEAR if isinstance(shape, RecurrentShape) else SOFTMAX for shape in spec[:count]]


def run_layer(base: Any, layer: Callable[..., Any], hidden_states: Tensor, /, **arguments: Any) -> Any:
    """Call a decoder layer; with gradient checkpointing, where the layer does not see to that itself."""
    wanted = getattr(base, "gradient_checkpointing", False) and base.training and torch.is_grad_enabled()
    if wanted and not isinstance(layer, GradientCheckpointingLayer):
        # Classes from before transformers 4.35 set the flag alone.
        run = getattr(base, "_gradient_checkpointing_func", None) or _checkpointed
        return run(functools.partial(layer, **arguments), hidden_states)
    return layer(hidden_states, **arguments)


def wants(value: Any, config: Any, name: str) -> bool:
    """Whether an optional output is asked for: by its argument, else by the config."""
    return bool(getattr(config, name, False) if value is None else value)


@dataclass
class Record:
    """The optional outputs of a forward, each None where nobody asked for it."""

    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    router_logits: tuple[Any, ...] | None = None
    asked: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any, hidden_states: Any, attentions: Any, router_logits: Any = False) -> Record:
        """A record of what is asked for, by a forward's arguments: True, False, or None for what the config says."""
        asked = {
            "hidden_states": wants(hidden_states, config, "output_hidden_states"),
            "attentions": wants(attentions, config, "output_attentions"),
            "router_logits": wants(router_logits, config, "output_router_logits"),
        }
        return cls(**{name: () if value else None for name, value in asked.items()}, asked=asked)

    def add_hidden(self, hidden_states: Tensor) -> None:
        """Note hidden states, if asked for."""
        if self.hidden_states is not None:
            self.hidden_states += (hidden_states,)

    def add(self, outputs: Iterable[Any]) -> None:
        """Note the attention and router logits in what a decoder layer returned: second, and last."""
        outputs = tuple(outputs)
        if self.attentions is not None:
            self.attentions += (outputs[1],)
        if self.router_logits is not None and outputs[-1] is not None:
            self.router_logits += (outputs[-1],)

    def output(
        self, kind: type[ModelOutput], hidden_states: Tensor, ready: Prepared, config: Any, return_dict: bool | None,
        **more: Any,
    ) -> Any:  # fmt: skip
        """What a base model returns: last hidden states and cache, what was recorded, and `more` of its kind."""
        made: Any = kind(  # type: ignore[call-arg]
            last_hidden_state=hidden_states, hidden_states=self.hidden_states, attentions=self.attentions,
            **{CACHE: ready.cache}, **more,
        )  # fmt: skip
        return given_or(config, return_dict, made)
