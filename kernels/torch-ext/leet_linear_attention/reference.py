"""The oracle: decayed linear attention in float64, in two forms that share nothing but the definition. Slow on purpose.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

Both take `linear_attention`'s arguments (without `method`), compute in float64 whatever they are given, return float64
and can be differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token: o `[B, T, H, V]` and the final state `[B or N, H, K, V]` or None, float64."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        tokens = (q.unsqueeze(-2), k.unsqueeze(-1), v.unsqueeze(-2), g[..., None, None].exp())
        for q_t, k_t, v_t, gamma_t in zip(*(x.unbind(1) for x in tokens), strict=True):
            state = torch.addcmul(k_t * v_t, gamma_t, state)
            outputs.append(q_t @ state)
        return scale * torch.cat(outputs, -2).transpose(1, 2) if outputs else v, state

    return _each_sequence(sequence, q, k, v, log_decay, initial_state, output_final_state, cu_seqlens)


def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum written out as attention with a decay mask, no state carried: same results as `recurrent`, T^2 memory."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        running = g.cumsum(1).transpose(1, 2)  # [B, H, T]
        apart = running[..., :, None] - running[..., None, :]
        future = torch.ones(apart.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        mask = apart.masked_fill(future, float("-inf")).exp()
        scores = torch.einsum("bthk,bshk->bhts", q, k) * mask
        out = torch.einsum("bhts,bshv->bthv", scores, v)
        out = out + torch.einsum("bthk,bht,bhkv->bthv", q, running.exp(), state)
        total = g.sum(1)[..., None]
        final = torch.einsum("bshk,bhs,bshv->bhkv", k, (total - running).exp(), v) + total.exp()[..., None] * state
        return scale * out, final

    return _each_sequence(sequence, q, k, v, log_decay, initial_state, output_final_state, cu_seqlens)


def _each_sequence(
    sequence: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Bring the arguments to float64 and one head count, and call `sequence` once per sequence of a packed row."""
    tokens = q.shape[1]
    shapes = [q.shape[2], k.shape[2], v.shape[2]]
    shapes += [] if log_decay is None else [log_decay.shape[-1]]
    shapes += [] if initial_state is None else [initial_state.shape[1]]
    heads = max(shapes)
    q, k, v = (x.double().repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v))
    if log_decay is None:
        g = q.new_zeros(q.shape[0], tokens, heads)
    else:
        g = log_decay.double().expand(q.shape[0], tokens, -1)
        g = g.repeat_interleave(heads // g.shape[-1], 2)
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    rows = q.shape[0] if cu_seqlens is None else 1
    if initial_state is None:
        initial_state = q.new_zeros(rows * (len(bounds) - 1), heads, k.shape[-1], v.shape[-1])
    states = initial_state.double().split(rows)
    results = [
        sequence(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], state)
        for a, b, state in zip(bounds[:-1], bounds[1:], states, strict=True)
    ]
    out = torch.cat([o for o, _ in results], 1)
    return out, torch.cat([s for _, s in results]) if output_final_state else None
