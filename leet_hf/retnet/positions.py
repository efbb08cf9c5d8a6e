"""Positions of RetNet: rotations of q and k, and how much has decayed so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """What the layers of one forward share, made once for all of them.

    cos, sin: float [B, T, 1, D / 2] (B may be 1). shrink: `decay_sums^-1/2`, float [B, T, H, 1], where outputs of
    retention are rescaled by it, else None. softmax: cos and sin of softmax layers, by head size and theta.
    """

    cos: Tensor
    sin: Tensor
    shrink: Tensor | None
    softmax: dict[tuple[int, float], tuple[Tensor, Tensor]]


# Angles that were made, by what they are of: a few hundred bytes each, which cost as many launches as a layer's step.
_kept: dict[tuple[int, float, str, torch.device], Tensor] = {}
_MOST = 256


def rotary_angles(dim: int, theta: float, kind: str, device: torch.device) -> Tensor:
    """Angle per position of each rotated pair, float32 [dim / 2].

    kind: "rope", `theta^(-2i/D)` (Su et al., arXiv 2104.09864), or "theta_shift", `theta^-linspace(0, 1, D/2)`
    (torchscale's RetNetRelPos). In float32 as in both sources: far positions multiply every rounding. Not to be
    written to: the next call gives the same tensor.
    """
    if torch.compiler.is_compiling():
        return _angles(dim, theta, kind, device)
    key = (dim, float(theta), kind, device)
    angles = _kept.get(key)
    if angles is None:
        with torch.inference_mode(False):
            angles = _angles(dim, theta, kind, device)
        if _lasts(angles):
            if len(_kept) >= _MOST:
                _kept.clear()
            _kept[key] = angles
    return angles


def _lasts(made: Tensor) -> bool:
    """Whether a tensor holds what it is supposed to, now and later: no mode made it, no CUDA graph is to fill it."""
    watched = torch._C._len_torch_dispatch_stack() > 0 or type(made) is not Tensor or made.device.type == "meta"
    return not watched and not (made.is_cuda and torch.cuda.is_current_stream_capturing())


def _angles(dim: int, theta: float, kind: str, device: torch.device) -> Tensor:
    if kind == "rope":
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    else:
        exponent = torch.linspace(0, 1, dim // 2, dtype=torch.float32, device=device)
    return 1.0 / theta**exponent


def rotary_tables(position_ids: Tensor, angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [B, T, 1, D / 2] for position_ids [B, T] and angles [D / 2]; float32, or float64 where dtype is."""
    phase = (position_ids[..., None].to(angles.dtype) * angles)[:, :, None]
    phase = phase.to(torch.promote_types(dtype, torch.float32))
    return phase.cos(), phase.sin()


def softmax_tables(dim: int, theta: float, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of softmax layers with heads of `dim`, for hidden states `like`."""
    return rotary_tables(position_ids, rotary_angles(dim, theta, "rope", like.device), like.dtype)


def decay_sums(counts: Tensor, log_decay: Tensor) -> Tensor:
    """`1 + gamma + ... + gamma^n` at position n of its sequence: counts [B, T], log_decay [H] to float [B, T, H, 1]."""
    reach = (counts[..., None] + 1) * log_decay
    return (torch.expm1(reach) / torch.expm1(log_decay))[..., None]
