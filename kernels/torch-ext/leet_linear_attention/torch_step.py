"""The buffered decode step in plain torch, for any device: serves wherever the Triton step can not run.

Reads the cursor on the host, so it waits for a device that is not the CPU and can not be captured in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .decay_factors import FLOOR
from .precision import full_precision


def per_token(log_decay: Tensor | None, like: Tensor, tokens: int) -> Tensor:
    """log_decay None, `[H]` or `[B, T, H]` as `[B, T, heads]` in the dtype of `like` `[B, R, heads]`."""
    if log_decay is None:
        return like.new_zeros(like.shape[0], tokens, like.shape[2])
    out = log_decay.to(like.dtype).expand(like.shape[0], tokens, -1)
    return out if out.shape[2] == like.shape[2] else out.repeat_interleave(like.shape[2] // out.shape[2], 2)


def running_decay(log_decays: Tensor) -> Tensor:
    """Running sum over tokens of `[B, n, H]`, as `[B, H, n]` float64: exact enough for its differences in fp32."""
    return log_decays.clamp_min(FLOOR[log_decays.dtype]).cumsum(1, dtype=torch.float64).transpose(1, 2)


def by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens `[B, n, h, D]` as `[B, heads, n, D]` in `dtype`."""
    x = x.transpose(1, 2).to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def fold_tokens(base: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor) -> None:
    """Take tokens into base `[B, H, K, V]`, in place: keys, values `[B, n, h, D]`, log_decays `[B, n, H]`.

    In float64: cheap for a few tokens, and neither autocast nor TF32 touches it, also where torch.compile traces it.
    """
    heads = base.shape[1]
    running = running_decay(log_decays)
    end = running[..., -1:]
    weights = (end - running).exp().unsqueeze(-1)
    update = (by_head(keys, heads, torch.float64) * weights).transpose(-1, -2) @ by_head(values, heads, torch.float64)
    base.mul_(end.exp().to(base.dtype).unsqueeze(-1)).add_(update)


def fold_held(base: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor) -> None:
    """As `fold_tokens` in fewer calls, where nothing traces and no CUDA graph is captured."""
    batch, heads, key_dim, value_dim = base.shape
    wide = torch.float64
    factors = decay_factors(log_decays.to(wide), batch * heads)
    weighed = in_lanes(keys, heads, wide).mT * factors[..., 1:]
    update = torch.bmm(weighed, in_lanes(values, heads, wide))
    base.view(batch * heads, key_dim, value_dim).mul_(factors[..., :1].to(base.dtype)).add_(update)


@full_precision
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    base: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decays: Tensor,
    cursor: Tensor,
    scale: float,
    buffer: int,
    keep: int,
) -> Tensor:
    """Advance a decode state by T <= buffer tokens in place and give their outputs `[B, T, H, V]` in q's dtype.

    q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]`; base, keys, values, log_decays and cursor are those of
    `DecodeState`. The oldest tokens go into base when the buffer would overflow, but never one of the last
    max(keep, T). Arguments are taken as checked.
    """
    tokens = q.shape[1]
    batch, heads, _, value_dim = base.shape
    if tokens == 0:
        return q.new_empty(batch, 0, heads, value_dim)
    start, count, _ = cursor.tolist()
    held = _append(k, v, log_decay, keys, values, log_decays, start, count)
    out = _outputs(q, *held, base, scale)
    fold = 0 if count + tokens <= buffer else min(count, count + tokens - max(keep, tokens))
    if fold:
        fold_held(base, *(x[:, :fold] for x in held))
        cursor[0].fill_((start + fold) % keys.shape[1])
    cursor[1].fill_(count - fold + tokens)
    return out


Held = tuple[Tensor, Tensor, Tensor]  # keys [B, n, Hk, K], values [B, n, Hv, V], log_decays [B, n, H], oldest first


def _append(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keys: Tensor,
    values: Tensor,
    log_decays: Tensor,
    start: int,
    count: int,
) -> Held:
    """Put tokens into the rings, wherever that is in them."""
    tokens, slots = k.shape[1], keys.shape[1]
    rings = (keys, values, log_decays)
    fresh = (k, v, per_token(log_decay, log_decays, tokens))
    total = count + tokens
    if start + total <= slots:
        # in one piece: views, no copies
        for ring, x in zip(rings, fresh, strict=True):
            ring.narrow(1, start + count, tokens).copy_(x)
        return tuple(ring.narrow(1, start, total) for ring in rings)  # type: ignore[return-value]
    held = (start + torch.arange(total, device=k.device)) % slots
    for ring, x in zip(rings, fresh, strict=True):
        ring.index_copy_(1, held[count:], x.to(ring.dtype))
    return tuple(ring.index_select(1, held) for ring in rings)  # type: ignore[return-value]


def decay_factors(log_decays: Tensor, lanes: int) -> Tensor:
    """`[B * H, 1, n + 1]` for log_decays `[B, n, H]`: the decay of the state, then of every token, to the last one.

    Each from the sum of what follows: nothing is subtracted, so float32 is exact enough.
    """
    batch, tokens, _ = log_decays.shape
    after = later(tokens, log_decays.dtype, log_decays.device)
    sums = torch.mm(log_decays[0].t(), after) if batch == 1 else torch.matmul(log_decays.mT, after)
    return sums.exp_().view(lanes, 1, tokens + 1)


def in_lanes(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens `[B, n, h, D]` as `[B * heads, n, D]` in `dtype`: a view of one row or token of as many heads in it."""
    batch, tokens, held, width = x.shape
    if held == heads and x.dtype == dtype:
        if batch == 1:
            return x[0].transpose(0, 1)
        if tokens == 1:
            return x.reshape(batch * heads, 1, width)
    return by_head(x, heads, dtype).flatten(0, 1)


@functools.lru_cache(maxsize=256)
def later(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[n, n + 1]`: 1 where the token (row) comes after the state (column 0) or after token column - 1."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ones(tokens, tokens + 1, dtype=dtype, device=device).tril()


def _outputs(q: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor, base: Tensor, scale: float) -> Tensor:
    """o `[B, T, H, V]` of the T newest tokens held."""
    heads, dtype, old = base.shape[1], base.dtype, keys.shape[1] - q.shape[1]
    running = running_decay(log_decays)
    new = running[..., old:]
    query = by_head(q, heads, dtype)
    apart = (new.unsqueeze(-1) - running.unsqueeze(-2)).clamp_max_(0).to(dtype).exp().tril_(old)
    weights = (query @ by_head(keys, heads, dtype).transpose(-1, -2)) * apart
    out = weights @ by_head(values, heads, dtype)
    out += (query * new.to(dtype).exp().unsqueeze(-1)) @ base
    return out.mul_(scale).transpose(1, 2).to(q.dtype).contiguous()
