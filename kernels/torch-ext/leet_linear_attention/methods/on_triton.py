"""What the Triton forms of the named algorithms share: their parameters, the launch, and where a sequence begins.

A kernel here serves one sequence, one state head and one block of value columns per program, for every form of
log_decay, packed or not, and carries the state in place in float32. All kernels take the same parameters, listed at
`Kernel`. Nothing is tuned or measured at run time, nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shapes import sequence_count, state_heads
from ..triton.launcher import OPTIONS

# Parameters that change from call to call: a kernel is compiled once whatever their values.
VARYING = [
    "T", "H", "group_q", "group_k", "group_v", "group_g",
    "sqb", "sqt", "sqh", "skb", "skt", "skh", "svb", "svt", "svh", "sgb", "sgt", "sgh",
]  # fmt: skip


class Kernel(NamedTuple):
    """A kernel, and its blocks for (K, V, in the interpreter?): value columns, constants of its own, warps.

    Parameters: q, k, v, log_decay, o [B, T, H, V], state [N, H, K, V] float32 to begin with and to overwrite,
    cu_seqlens; T, H, state heads per head of q, k, v and log_decay, scale, strides of the first three dimensions of q,
    k, v and log_decay (see `VARYING`); constants K, V, BV (value columns), DECAY (0 none, 1 per head, 2 per token),
    PACKED, PRECISE (float32 inputs) and those of its own.
    """

    function: Any
    blocks: Callable[[int, int, bool], tuple[int, dict[str, int], int]]


@triton.jit
def sequence(i_n, cu_ptr, T, PACKED: tl.constexpr):
    """Row of the batch, first token in it (both int64) and number of tokens of sequence `i_n` (int64)."""
    if PACKED:
        first = tl.load(cu_ptr + i_n).to(tl.int64)
        return i_n * 0, first, (tl.load(cu_ptr + i_n + 1).to(tl.int64) - first).to(tl.int32)
    else:
        return i_n, i_n * 0, T


@triton.jit
def decay_parts(g):
    """exp(g) in two float32 parts: one rounded factor, applied at every token, errs to the same side each time."""
    exact = tl.exp(g.to(tl.float64))
    high = exact.to(tl.float32)
    return high, (exact - high.to(tl.float64)).to(tl.float32)


def operator_of(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`forward` of the operator, with `library.forward`'s arguments, by a Triton kernel."""

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
        batch, tokens = q.shape[:2]
        heads, key_dim, value_dim = state_heads(q, k, v, log_decay, initial_state), q.shape[-1], v.shape[-1]
        sequences = sequence_count(q, cu_seqlens)
        o = q.new_empty(batch, tokens, heads, value_dim)
        state = q.new_zeros((sequences, heads, key_dim, value_dim), dtype=torch.float32)
        if initial_state is not None:
            state.copy_(initial_state)
        decay = 0 if log_decay is None else (1 if log_decay.dim() == 1 else 2)
        block_v, constants, warps = kernel.blocks(key_dim, value_dim, not q.is_cuda)
        grid = (triton.cdiv(value_dim, block_v) * sequences * heads,)
        if grid[0] and tokens:
            with torch.cuda.device_of(q):  # Triton launches on the current device
                kernel.function[grid](
                    q, k, v, log_decay, o, state, cu_seqlens,
                    tokens, heads, heads // q.shape[2], heads // k.shape[2], heads // v.shape[2],
                    1 if log_decay is None else heads // log_decay.shape[-1], scale,
                    *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                    *(log_decay.stride() if log_decay is not None and decay == 2 else (0, 0, 0)),
                    K=key_dim, V=value_dim, BV=block_v, DECAY=decay, PACKED=cu_seqlens is not None,
                    PRECISE=q.dtype == torch.float32, **constants, num_warps=warps, **OPTIONS,
                )  # fmt: skip
        return o, state if output_final_state else None

    return forward
