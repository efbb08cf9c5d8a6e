"""The forward of a recurrent layer: adapter.project, attend, adapter.finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attend import attend
from .cache import RecurrentLayer
from .fused.remade import remake
from .versions import CACHE, cache_argument

if TYPE_CHECKING:
    from .adapters.base import Adapter, Decay


@dataclass
class LayerBinding:
    """What patching puts on a recurrent layer. A plain attribute: no parameter, no buffer, nothing a state dict shows.

    decay: fixed decays, None where the adapter gives them per token. method: of the operator. had_entry: how to take
    the patch off again.
    """

    adapter: Adapter
    index: int
    decay: Decay | None
    method: str
    had_entry: bool = False
    _tensors: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def log_decay(self, like: Tensor) -> Tensor | None:
        """The fixed decays [H] on the device of `like`, float32 (float64 for float64) whatever the model's dtype."""
        return fixed_log_decay(None if self.decay is None else self.decay.log_decays, like, self._tensors)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": {}}


def fixed_log_decay(
    log_decays: Sequence[float] | None, like: Tensor, kept: dict[tuple[torch.device, torch.dtype], Tensor]
) -> Tensor | None:
    """Fixed decays [H] on the device of `like`, float32 (float64 for float64). kept: those made so far."""
    if log_decays is None:
        return None
    key = (like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
    tensor = kept.get(key)
    if tensor is None:
        with torch.inference_mode(False):
            tensor = torch.tensor(log_decays, dtype=key[1], device=key[0])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)  # else CUDA graphs copy it at every replay
            kept[key] = tensor
    return tensor


def layer_forward(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Replaces the forward of a recurrent layer.

    hidden_states [B, T, hidden]; attention_mask None or [B, T], 0 at pads; past_key_values or cache (the names of
    older and newer versions of transformers) None or a cache with recurrent layers. Returns the output [B, T, hidden]
    and, if attentions are asked for, the state [B, H, K, V] (what the stock layer returns there). Raises ValueError for
    a cache without recurrent layers.
    """
    binding: LayerBinding = self._leet  # type: ignore[assignment]
    adapter = binding.adapter
    past = cache_argument(past_key_values, cache)
    q, k, v, log_decay, rest, again = adapter.project(self, hidden_states, position_embeddings)
    o, state = attend(
        q, k, v, binding.log_decay(q) if log_decay is None else log_decay,
        scale=adapter.scale(self),
        method=binding.method,
        mask=attention_mask,
        seq_idx=kwargs.get("seq_idx"),
        cu_seqlens=kwargs.get("cu_seq_lens_q"),
        layer=None if past is None else _own_layer(past, binding.index),
        return_state=bool(kwargs.get("output_attentions")),
    )  # fmt: skip
    if again is not None and o.requires_grad:
        remake(o, (q, k, v), again)
        del q, k, v, again
    return adapter.finish(self, o, hidden_states, rest), state


def _own_layer(cache: Any, index: int) -> RecurrentLayer:
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if not isinstance(layer, RecurrentLayer):
        raise ValueError(
            f"{CACHE} has a {type(layer).__name__} at layer {index}, must be a RecurrentLayer: call the whole "
            "model, or leet_hf.upgrade_cache(cache, model) first"
        )
    return layer
