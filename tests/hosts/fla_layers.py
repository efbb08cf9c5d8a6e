"""Layers of RetNet as flash-linear-attention (FLA) has them, in plain PyTorch: quadratic, row by row, no kernels.

Written from the definition in Sun et al., "Retentive Network" (arXiv 2307.08621), and from the modules, names,
signatures and cache of the package flash-linear-attention 0.6.0 (`fla.layers`, `fla.modules` and
`fla.models.cache_utils`), which itself runs on a GPU alone. Parameter and buffer names are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache as HFCache


class Cache(HFCache):
    """FLA's own cache: a state and a count of tokens per layer, with an `update` of another form than transformers'."""

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[Tensor] = []
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.states)

    def update(self, recurrent_state: Tensor, layer_idx: int, offset: int) -> None:  # type: ignore[override]
        if layer_idx == len(self.states):
            self.states.append(recurrent_state)
            self.seen.append(offset)
        else:
            self.states[layer_idx] = recurrent_state
            self.seen[layer_idx] += offset

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen[layer_idx] if layer_idx < len(self.seen) else 0


class RMSNorm(nn.Module):
    """With `prenorm`, the residual is added before and returned besides."""

    def __init__(self, hidden_size: int, elementwise_affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
        x = x if residual is None else x + residual
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        normed = normed if self.weight is None else normed * self.weight.float()
        return (normed.to(x.dtype), x) if prenorm else normed.to(x.dtype)


class FusedRMSNormGated(RMSNorm):
    """The norm of x times the swish of g."""

    def forward(self, x: Tensor, g: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * nn.functional.silu(g.float()).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rope by halves of the channels, angle of channel i at position t: t * base^(-2i / dim)."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base, self.scale_base, self.interleaved = dim, base, None, False
        self.register_buffer("inv_freq", torch.empty(dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.inv_freq.copy_(1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def forward(self, x: Tensor, offset: int) -> Tensor:
        """x [T, H, D] of one sequence that begins at position `offset`."""
        angle = torch.outer(torch.arange(offset, offset + len(x), dtype=torch.float32, device=x.device), self.inv_freq)
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class MultiScaleRetention(nn.Module):
    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        feature_map: str | None = None,
        use_output_gate: bool = True,
        gate_fn: str = "swish",
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        fuse_norm: bool = True,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.layer_idx = mode, hidden_size, layer_idx
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_groups = num_heads // self.num_kv_heads
        self.feature_map_fn = None if feature_map is None else ACT2FN[feature_map]
        self.use_short_conv, self.use_output_gate = False, use_output_gate
        self.key_dim, self.value_dim = round(hidden_size * expand_k), round(hidden_size * expand_v)
        self.head_k_dim, self.head_v_dim = self.key_dim // num_heads, self.value_dim // num_heads

        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim // self.num_kv_groups, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim // self.num_kv_groups, bias=False)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.fuse_norm_and_gate = gate_fn == "swish" and fuse_norm and use_output_gate
        if self.fuse_norm_and_gate:
            self.g_norm_swish_gate = FusedRMSNormGated(self.head_v_dim, elementwise_affine, norm_eps)
        else:
            self.g_norm = RMSNorm(self.head_v_dim, elementwise_affine, norm_eps)
            self.gate_fn = ACT2FN[gate_fn]
        self.rotary = RotaryEmbedding(self.head_k_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Cache | None]:
        rows, tokens, _ = hidden_states.shape
        past = None
        if past_key_values is not None and len(past_key_values) > self.layer_idx:
            past = past_key_values.states[self.layer_idx]
        o = torch.zeros(rows, tokens, self.num_heads, self.head_v_dim, dtype=hidden_states.dtype)
        states = []
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        for row, places, offset in _sequences(rows, tokens, attention_mask, kwargs.get("cu_seqlens"), seen):
            x = hidden_states[row, places]
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q, k = q.unflatten(-1, (-1, self.head_k_dim)), k.unflatten(-1, (-1, self.head_k_dim))
            if self.feature_map_fn is not None:
                q, k = self.feature_map_fn(q), self.feature_map_fn(k)
            q, k = self.rotary(q, offset), self.rotary(k, offset)
            v = v.unflatten(-1, (-1, self.head_v_dim))
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=1) for t in (k, v))
            o[row, places], state = _retention(q, k, v, None if past is None else past[row])
            states.append(state)
        if past_key_values is not None:
            past_key_values.update(torch.stack(states), self.layer_idx, tokens)

        if self.fuse_norm_and_gate:
            o = self.g_norm_swish_gate(o, self.g_proj(hidden_states).unflatten(-1, (-1, self.head_v_dim))).flatten(-2)
        else:
            o = self.g_norm(o).flatten(-2)
            o = o * self.gate_fn(self.g_proj(hidden_states)) if self.use_output_gate else o
        return self.o_proj(o), None, past_key_values


class Attention(nn.Module):
    """FLA's softmax attention, for the layers that config.attn names: rope of a base of its own, no cache here."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        rope_theta: float = 10000.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.layer_idx, self.qk_norm, self.window_size = num_heads, layer_idx, qk_norm, window_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_groups, self.head_dim = num_heads // self.num_kv_heads, hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.rotary = RotaryEmbedding(self.head_dim, rope_theta)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None]:
        assert past_key_values is None
        rows, tokens, _ = hidden_states.shape
        o = torch.zeros_like(hidden_states)
        for row, places, offset in _sequences(rows, tokens, attention_mask, kwargs.get("cu_seqlens"), 0):
            x = hidden_states[row, places]
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = self.rotary(q, offset), self.rotary(k, offset)
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=1) for t in (k, v))
            scores = torch.einsum("thd,shd->hts", q, k) * self.head_dim**-0.5
            scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), float("-inf"))
            o[row, places] = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(-2)
        return self.o_proj(o), None, None


def _sequences(
    rows: int, tokens: int, mask: Tensor | None, bounds: Tensor | None, seen: int
) -> list[tuple[int, Tensor, int]]:
    """(row, places of its real tokens, how many real ones came before) for each sequence."""
    if bounds is not None:
        pieces = zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        return [(0, torch.arange(start, stop), 0) for start, stop in pieces]
    if mask is None:
        return [(row, torch.arange(tokens), seen) for row in range(rows)]
    return [(row, mask[row, -tokens:].nonzero().flatten(), int(mask[row, :-tokens].sum())) for row in range(rows)]


def _retention(q: Tensor, k: Tensor, v: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """o_t = K^-0.5 * (sum over s <= t of gamma^(t-s) (q_t . k_s) v_s + gamma^(t+1) q_t S), and the next S.

    q, k [T, H, K], v [T, H, V], S [H, K, V]; gamma_h = 1 - 2^(-5-h).
    """
    length, heads = q.shape[:2]
    scale = q.shape[-1] ** -0.5
    gamma = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=torch.float64))
    place = torch.arange(length, dtype=torch.float64)
    age = place[:, None] - place
    decay = torch.where(age >= 0, gamma[:, None, None] ** age.clamp(min=0), 0).to(q.dtype)
    o = torch.einsum("thk,shk,hts,shv->thv", q, k, decay, v) * scale
    state = torch.einsum("shk,hs,shv->hkv", k, decay[:, -1], v)
    if past is not None:
        since = (gamma[:, None] ** (place + 1)).to(q.dtype)
        o = o + torch.einsum("thk,ht,hkv->thv", q, since, past) * scale
        state = state + since[:, -1, None, None] * past
    return o, state


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, hidden_ratio: int | None, intermediate_size: int | None) -> None:
        super().__init__()
        if intermediate_size is None:
            intermediate_size = int(hidden_size * (4 if hidden_ratio is None else hidden_ratio) * 2 / 3)
            intermediate_size = 256 * ((intermediate_size + 255) // 256)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
