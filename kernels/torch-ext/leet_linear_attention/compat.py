"""LeetDecoding's function on this operator: the same signature, names and layout, so that only the import changes.

    from leet_linear_attention import causal_linear_decoder

LeetDecoding 0.0.3 (arXiv:2501.02573) computes, per head and without a scale,

    o_t = sum_{i <= t} decay^(t - i) (q_t . k_i) v_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from .api import linear_attention
from .checks import looks_at_values
from .dispatch import available_methods

# attn_method -> methods of linear_attention, the first that can run here: where a Triton form can not (on a CPU, in
# float64), the torch form of the same algorithm computes the call.
ATTENTION_METHODS = {
    "vanilla": ("vanilla",),
    "lightningAttention2": ("triton", "lightning"),
    "lightningAttention2_torch": ("lightning",),
    "FleetAttention": ("fleet_triton", "fleet"),
    "FleetAttention_torch": ("fleet",),
    "causal_dot_product": ("causal_dot_product_triton", "causal_dot_product"),
    "causal_dot_product_torch": ("causal_dot_product",),
    "recursion": ("recursion",),
    "block-based": ("block_based",),
}
# Stands for a decay of 0: too small to be seen beside any other, large enough for its logarithm to have a gradient.
_ZERO_DECAY = 1e-30


def causal_linear_decoder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_mask_weight: bool = False,
    gamma: Tensor | None = None,
    is_need_exp: bool = True,
    attn_method: str | None = None,
) -> Tensor:
    """Causal linear attention with one decay per head, called as LeetDecoding's function of this name.

    ============== ===== =========== ==============
    is_mask_weight gamma is_need_exp decay per token
    ============== ===== =========== ==============
    False          None  any         1 (none)
    False          given any         an error
    True           None  any         1 (none)
    True           given True        exp(-gamma)
    True           given False       gamma
    ============== ===== =========== ==============

    Unlike there, every method reads gamma the same way, takes every length, dtype and device, and has gradients for q,
    k, v and gamma; sums are float32 for every dtype.

    Args:
        q, k: [B, H, T, K], any T >= 0, K <= 512; float32, float16, bfloat16 (float64 by the torch forms).
        v: [B, H, T, V], V <= 512, in q's dtype.
        is_mask_weight: whether the causal mask decays.
        gamma: [H], or [H, 1] or [H, 1, 1], in any floating dtype. With ``is_need_exp`` a rate >= 0, otherwise the decay
            itself, 0 to 1. Decays that grow (a negative rate, a factor above 1) are refused.
        is_need_exp: whether the decay is exp(-gamma) rather than gamma.
        attn_method: one of ``ATTENTION_METHODS``, all of which give the same result; None is the fastest here.
            ``lightningAttention2``, ``FleetAttention`` and ``causal_dot_product`` are Triton kernels; where those can
            not run, the torch form of the same algorithm does.

    Returns:
        [B, H, T, V] in q's dtype: a view of memory in which tokens come before heads, as
        ``torch.nn.functional.scaled_dot_product_attention`` gives it, so that the usual
        ``o.transpose(1, 2).reshape(B, T, H * V)`` copies nothing.

    Raises:
        ValueError: gamma without ``is_mask_weight``; a shape, dtype, device, value or name is wrong. Values of gamma
            are looked at on the CPU always, on a GPU where the environment variable LEET_CHECK_VALUES is 1.
        TypeError: an argument is no tensor.
    """
    _check_layout(q, k, v)
    if gamma is not None and not is_mask_weight:
        raise ValueError(
            "gamma was given with is_mask_weight=False, must be None then: pass is_mask_weight=True to decay"
        )
    log_decay = None if gamma is None else _log_decay(gamma, q, is_need_exp)
    method = "auto" if attn_method is None else _method(attn_method, q)
    o, _ = linear_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), log_decay, method=method)
    return o.transpose(1, 2)


def _method(attn_method: str, q: Tensor) -> str:
    if attn_method not in ATTENTION_METHODS:
        raise ValueError(f"attn_method was {attn_method!r}, must be None or one of {sorted(ATTENTION_METHODS)}")
    refusals = available_methods(q.device, q.dtype)
    forms = ATTENTION_METHODS[attn_method]
    return next((name for name in forms if refusals[name] is None), forms[-1])


def _log_decay(gamma: Tensor, q: Tensor, is_need_exp: bool) -> Tensor:
    """[H] float32 (float64 for float64 q), differentiable."""
    heads = q.shape[1]
    if not isinstance(gamma, Tensor):
        raise TypeError(f"gamma is a {type(gamma).__name__}, must be a torch.Tensor: convert it with torch.as_tensor")
    if gamma.dim() == 0 or gamma.shape[0] != heads or gamma.numel() != heads:
        raise ValueError(f"gamma has shape {list(gamma.shape)}, must be [H] = [{heads}]: give one number per head of q")
    if not gamma.is_floating_point():
        raise ValueError(f"gamma is {gamma.dtype}, must be a floating dtype: convert it")
    if gamma.device != q.device:
        raise ValueError(f"gamma is on {gamma.device}, must be on q's device {q.device}: move it there")
    if looks_at_values(gamma):
        _check_values(gamma.detach(), is_need_exp)
    gamma = gamma.reshape(heads).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if is_need_exp:
        return -gamma
    return torch.where(gamma == 0, gamma + _ZERO_DECAY, gamma).log()


def _check_values(gamma: Tensor, is_need_exp: bool) -> None:
    wrong = gamma[~((gamma >= 0) & (gamma < float("inf") if is_need_exp else gamma <= 1))]
    if wrong.numel():
        must, other = (">= 0 and finite", "exp(-gamma)") if is_need_exp else ("from 0 to 1", "gamma")
        raise ValueError(
            f"gamma holds {wrong[0].item():.6g}, must be {must} with is_need_exp={is_need_exp}, where the decay of a "
            f"token is {other}: a mask that grows is no decay; is_need_exp says whether gamma is a rate or a factor"
        )


def _check_layout(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x, form in (("q", q, "[B, H, T, K]"), ("k", k, "[B, H, T, K]"), ("v", v, "[B, H, T, V]")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, must be a torch.Tensor: convert it with torch.as_tensor")
        compared = slice(None) if name == "k" else slice(3)
        if x.dim() != 4 or x.shape[compared] != q.shape[compared]:
            like = "" if name == "q" else f" with q's sizes {list(q.shape[compared])}"
            raise ValueError(
                f"{name} has shape {list(x.shape)}, must be {form}{like}: heads come before tokens here "
                "(linear_attention takes tokens first, and grouped heads)"
            )
