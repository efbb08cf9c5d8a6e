"""The two functions of the package: check the arguments, choose a method, call the operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import library
from .checks import check_linear_attention
from .dispatch import choose
from .state import DecodeState
from .state_checks import check_step
from .torch_token import step_one


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain(*tensors: Tensor | None) -> bool:
    """Whether nothing watches the call: no tracing, no dispatch mode, no transform, no tensor subclass.

    The operators exist for those; where there are none, calling past them halves the host's time for a call.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    batch_invariant: bool = False,
    method: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Decayed linear attention: ``S_t = exp(g_t) S_{t-1} + k_t v_t^T``, ``o_t = scale * q_t^T S_t``.

    The current token is not decayed. H, the number of state heads, is the largest head count among the arguments; the
    heads of q, k and v may each divide it (state head h reads head ``h // (H // heads)``).

    Args:
        q, k: [B, T, Hq, K] and [B, T, Hk, K], T >= 0, K <= 512, float32, bfloat16 or float16 (float64 by torch).
        v: [B, T, Hv, V], V <= 512, in q's dtype.
        log_decay: g, natural logarithm of the decay, finite and <= 0: None (no decay), [H] or [B, T, H], float32.
        scale: factor on the output.
        initial_state: S_0, [B, H, K, V] float32, or [N, H, K, V] with ``cu_seqlens``; None is zero.
        output_final_state: whether to return the last state.
        cu_seqlens: [N + 1] int32 or int64, where the sequences packed in one row (B = 1) begin and end.
        batch_invariant: give every row bitwise the same outputs and gradients whatever else is in the batch (Triton
            alone). Sequences are then never cut into segments, which costs time where B * H is small and T is large.
        method: ``"auto"``, or the name of a method (see ``available_methods``).

    Returns:
        o [B, T, H, V] in q's dtype; final state [B or N, H, K, V] float32 or None. Both carry gradients to q, k,
        v, log_decay and initial_state. Sums and states are float32 for every dtype; float32 inputs use no TF32.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong (values: on CPU tensors always, on a GPU where
            the environment variable LEET_CHECK_VALUES is 1), or no method can serve the call.
    """
    check_linear_attention(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    chosen = choose(method, q.device, q.dtype)
    if batch_invariant and chosen != "triton":
        raise ValueError(
            f"batch_invariant is True with method {chosen!r}, must be False there: only 'triton' gives this promise"
        )
    arguments = (
        _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v),
        log_decay, initial_state, cu_seqlens, float(scale), output_final_state, batch_invariant, chosen,
    )  # fmt: skip
    if not _plain(q, k, v, log_decay, initial_state, cu_seqlens):
        o, final_state = torch.ops.leet_linear_attention.forward(*arguments)
        return o, final_state if output_final_state else None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:5]):
        return library.Differentiable.apply(*arguments)
    return library.forward(*arguments)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: DecodeState,
    *,
    scale: float = 1.0,
    method: str = "auto",
) -> Tensor:
    """Advance a decode state in place by T tokens, T from 1 to the state's buffer, and return their outputs.

    Args:
        q, k, v, log_decay, scale, method: as for ``linear_attention``; T at most ``state.buffer``.
        state: the decode state of these B rows and H heads.

    Returns:
        o [B, T, H, V] in q's dtype. It carries no gradient: decoding is for inference.

    Raises:
        ValueError: as ``linear_attention``; also where an argument does not fit the state.
    """
    check_step(q, k, v, log_decay, scale, state)
    chosen = choose(method, q.device, q.dtype)
    operator: Callable[..., Tensor] = torch.ops.leet_linear_attention.step
    with torch.no_grad():
        if _plain(q, k, v, log_decay):
            if chosen == "torch" and q.is_cpu and q.shape[1] == 1:
                o = step_one(q, k, v, log_decay, state.views(), scale, state.buffer, state.keep)
                if o is not None:
                    return o
            operator = library.step
        return operator(
            _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v), log_decay,
            state.base, state.keys, state.values, state.log_decays, state.cursor,
            float(scale), state.buffer, state.keep, chosen,
        )  # fmt: skip


def step_asks_the_device(state: DecodeState, tokens: int, method: str = "auto") -> bool:
    """Whether a step of T = `tokens` tokens reads the state's counter on the host, so that no CUDA graph can hold it.

    The torch method does; so does a Triton step whose tokens and buffer do not fit a block's shared memory.
    """
    device, dtype = state.keys.device, state.keys.dtype
    if choose(method, device, dtype) == "torch" or choose("auto", device, dtype) == "torch":
        return True
    from .triton import tuning

    width_k, width_v = state.base.shape[2:]
    index = device.index if device.type == "cuda" else -1
    return tuning.step_config(width_k, width_v, tokens, state.buffer, state.keys.element_size(), index) is None
