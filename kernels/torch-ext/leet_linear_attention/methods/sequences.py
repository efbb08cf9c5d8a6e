"""From one sequence to the operator: what the torch forms of the named algorithms share.

An algorithm is written for whole sequences of one length, heads first, in the type that sums are taken in. Head groups,
scale, narrow dtypes, states and packing are dealt with here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..precision import full_precision
from ..shapes import state_heads
from .decay import Decay

# (q [B, H, T, K] times scale, k [B, H, T, K], v [B, H, T, V], decay, state [B, H, K, V] or None for zeros, whether the
# final state is wanted) -> (o [B, H, T, V], final state [B, H, K, V], or None where it is not wanted)
Algorithm = Callable[[Tensor, Tensor, Tensor, Decay, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def operator_of(algorithm: Algorithm) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`forward` of the operator, with `library.forward`'s arguments, from an algorithm for one sequence.

    float16, bfloat16 and float32 are computed in float32 without TF32, float64 in float64. Packed sequences are taken
    one after another, for which their bounds are read: on a GPU the host waits for them, once, and a CUDA graph can not
    hold the call.
    """

    @full_precision
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        heads = state_heads(q, k, v, log_decay, initial_state)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows = q.shape[0] if cu_seqlens is None else 1
        bounds = [0, q.shape[1]] if cu_seqlens is None else _bounds(cu_seqlens)
        o = torch.empty((*q.shape[:2], heads, v.shape[-1]), dtype=q.dtype, device=q.device)
        states = []
        for n in range(len(bounds) - 1):
            a, b = bounds[n], bounds[n + 1]
            qn, kn, vn = (_heads_first(x[:, a:b], heads, dtype) for x in (q, k, v))
            g = log_decay[:, a:b] if log_decay is not None and log_decay.dim() == 3 else log_decay
            decay = Decay(g, heads, b - a, dtype, q.device)
            state = initial_state[n * rows : (n + 1) * rows] if initial_state is not None else None
            on, final = algorithm(qn if scale == 1.0 else qn * scale, kn, vn, decay, state, output_final_state)
            o[:, a:b].copy_(on.transpose(1, 2))
            states.append(final)
        if not output_final_state:
            return o, None
        return o, torch.cat([s for s in states if s is not None])

    return forward


def _heads_first(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """`x` `[B, T, h, D]` as `[B, H, T, D]` in `dtype`, each head repeated to `heads` in all."""
    x = x.transpose(1, 2).to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _bounds(cu_seqlens: Tensor) -> list[int]:
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "cu_seqlens is on a GPU whose work is being captured in a CUDA graph, must be readable by the host: the "
            "torch forms of the named methods take packed sequences one by one; use method='auto'"
        )
    bounds: list[int] = cu_seqlens.tolist()
    return bounds
