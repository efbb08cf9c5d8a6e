"""THE place where q, k and v meet mask, packing, cache and operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leet_linear_attention import linear_attention, linear_attention_step

from .cache import RecurrentLayer
from .packing import beginnings, sequence_index

# A log_decay that forgets everything: exp of it is exactly 0 in float32 (from -104 on), and it is finite.
FORGET = -110.0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float = 1.0,
    method: str = "auto",
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    layer: RecurrentLayer | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Decayed linear attention of a model's tokens, after those its cache layer has seen.

    Args:
        q, k, v, log_decay, scale, method, cu_seqlens: as for `linear_attention`.
        mask: [B, T], 0 at pads. A pad leaves the state as it is and gives 0.
        seq_idx: [B, T]; where it changes, the state starts again from zero. Not used where cu_seqlens can be.
        layer: a recurrent layer of a cache, advanced by these tokens; packed sequences need one without tokens.
        return_state: whether to return the last state.

    Returns:
        o [B, T, H, V] in q's dtype and the last state [B, H, K, V], or None.
    """
    if layer is not None and cu_seqlens is not None and layer.stepped(q.shape[1]):
        seq_idx, cu_seqlens = sequence_index(cu_seqlens, q.shape[1]), None
    if mask is not None:
        q, k, v, log_decay = _silence_pads(q, k, v, log_decay, mask.bool())
    if seq_idx is not None and cu_seqlens is None:
        log_decay = _forget_at(beginnings(seq_idx), q, k, v, log_decay)
    if layer is not None:
        return _after_the_past(q, k, v, log_decay, scale, method, cu_seqlens, layer, return_state)
    o, state = linear_attention(
        q, k, v, log_decay, scale=scale, output_final_state=return_state, cu_seqlens=cu_seqlens, method=method
    )
    return o, _last_sequence(state, cu_seqlens)


def _after_the_past(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None,
    scale: float, method: str, cu_seqlens: Tensor | None, layer: RecurrentLayer, return_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Few tokens by a step; many by the operator, the last of them by a step if they may be taken back."""
    dtype, tokens = q.dtype, q.shape[1]
    state = layer.ready(q.shape[0], tokens, dtype, q.device)
    if not q.dtype == k.dtype == v.dtype == state.keys.dtype:
        q, k, v = (x.to(state.keys.dtype) for x in (q, k, v))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_decay, layer.graph)):
        o, final = linear_attention(
            q, k, v, log_decay, scale=scale, initial_state=layer.differentiable_state(),
            output_final_state=True, cu_seqlens=cu_seqlens, method=method,
        )  # fmt: skip
        final = _last_sequence(final, cu_seqlens)
        layer.load(final, tokens)
        return o.to(dtype), final if return_state else None

    stepped = layer.stepped(tokens)
    outputs = []
    if stepped < tokens:
        head = slice(0, tokens - stepped)
        o, final = linear_attention(
            q[:, head], k[:, head], v[:, head], _of_tokens(log_decay, head), scale=scale, method=method,
            initial_state=state.fold() if layer.has_tokens else None, output_final_state=True, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        layer.load(_last_sequence(final, cu_seqlens), tokens - stepped)
        outputs.append(o)
    if stepped:
        tail = slice(tokens - stepped, tokens)
        decay = _of_tokens(log_decay, tail)
        outputs.append(
            linear_attention_step(q[:, tail], k[:, tail], v[:, tail], decay, state, scale=scale, method=method)
        )
        layer.count_step(stepped)
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return o.to(dtype), layer.current_state() if return_state else None


def _silence_pads(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, real: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pads add nothing to the state (k, v = 0), do not let it decay (log_decay 0) and read nothing (q = 0)."""
    q, k, v = (x.masked_fill(~real[..., None, None], 0) for x in (q, k, v))
    return q, k, v, None if log_decay is None else torch.where(real[..., None], log_decay, 0.0)


def _forget_at(where: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    if log_decay is None:
        heads = max(x.shape[2] for x in (q, k, v))
        log_decay = torch.zeros(heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return torch.where(where[..., None], FORGET, log_decay)


def _of_tokens(log_decay: Tensor | None, tokens: slice) -> Tensor | None:
    return log_decay[:, tokens] if log_decay is not None and log_decay.dim() == 3 else log_decay


def _last_sequence(state: Any, cu_seqlens: Tensor | None) -> Any:
    """The state of the last packed sequence that has tokens, [1, H, K, V]; without packing, the state."""
    if state is None or cu_seqlens is None:
        return state
    place = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    last = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], place, 0).max()
    return state.index_select(0, last[None])
