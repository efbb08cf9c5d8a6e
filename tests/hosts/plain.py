"""What stand-ins for remote code share: linear attention, norms and ropes by their definitions, softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes: a series for powers of two; else those of the next lower one n, and every second of 2n."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def decayed_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """o_t = scale * sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s, by the full matrix of weights.

    q, k, v [B, H, T, D], slopes [H] > 0. Returns [B, H, T, V] in v's dtype; sums in float32 at least.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    place = torch.arange(q.shape[2], dtype=dtype, device=q.device)
    age = place[:, None] - place
    weight = torch.where(age >= 0, torch.exp(-slopes.to(dtype)[:, None, None] * age.clamp(min=0)), 0.0)  # [H, T, T]
    scores = scale * (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * weight
    return (scores @ v.to(dtype)).to(v.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x)


class Rotary(nn.Module):
    """cos and sin [B, T, dim] of angles position * theta^(-2i / dim), the frequencies repeated twice."""

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(0, self.dim, 2, dtype=torch.float32, device=x.device)
        angles = position_ids[..., None].float() * self.theta ** (-place / self.dim)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class RotaryTables(nn.Module):
    """As `Rotary`, by tables [positions, dim] that are made longer when a longer one is asked for."""

    def __init__(self, dim: int, base: float, positions: int) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.register_buffer("inv_freq", base ** (-torch.arange(0, dim, 2) / dim), persistent=False)
        self._set_cos_sin_cache(positions)

    def _set_cos_sin_cache(self, positions: int) -> None:
        self.max_seq_len_cached = positions
        angles = torch.outer(self.places(positions), self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def places(self, positions: int) -> Tensor:
        return torch.arange(positions, device=self.inv_freq.device, dtype=self.inv_freq.dtype)

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len)
        return self.cos_cached[:seq_len].to(x.dtype), self.sin_cached[:seq_len].to(x.dtype)


class ScaledRotaryTables(RotaryTables):
    """With positions divided by a factor, as remote code scales ropes: in a derived class."""

    factor = 4.0

    def _set_cos_sin_cache(self, positions: int) -> None:
        super()._set_cos_sin_cache(positions)

    def places(self, positions: int) -> Tensor:
        return super().places(positions) / self.factor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, D] with its first channels turned, as many as cos [B, T, R] has, in halves."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, kept], dim=-1)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def softmax_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as the config's `_attn_implementation` says. module has num_key_value_groups and is_causal.

    q, k, v [B, H, T, D]. Returns [B, T, H, V] and, where it is eager, the weights.
    """
    name = module.config._attn_implementation
    attend: Callable[..., Any] = _eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return attend(module, q, k, v, mask, scaling=scale, dropout=0.0, **kwargs)


def _eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask[..., : k.shape[2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


def causal_mask(tokens: int, like: Tensor, implementation: str) -> Tensor | None:
    """The mask of one row without pads: None where the attention is causal by itself, else [1, 1, T, T], 0 or -inf."""
    if implementation != "eager":
        return None
    return torch.full((tokens, tokens), float("-inf"), dtype=like.dtype, device=like.device).triu(1)[None, None]
