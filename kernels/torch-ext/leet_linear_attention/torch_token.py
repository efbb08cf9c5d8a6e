"""A decode step of one token in plain torch, in as few calls as it takes: on a CPU they are what costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import full_precision
from .torch_step import fold_held, in_lanes, later, per_token

MOST_PLACES = 64


class Place(NamedTuple):
    """What a step reads and writes that finds `start` and `count` in the cursor, n = count + 1 tokens with its own.

    key, value, decay `[B, 1, ..]`: the slot of the new token. keys `[B, n, Hk, K]`, values `[B, n, Hv, V]` and
    log_decays `[B, H, n]`: all tokens. factors `[B, H, n + 1]`: for the decay of the state and of every token to the
    last one, which of_state `[B * H, 1, 1]` and of_tokens `[B * H, 1, n]` are views of. lanes: keys `[B * H, K, n]` and
    values `[B * H, n, V]` where views are enough for that, else None.
    """

    key: Tensor
    value: Tensor
    decay: Tensor
    keys: Tensor
    values: Tensor
    log_decays: Tensor
    later: Tensor
    factors: Tensor
    of_state: Tensor
    of_tokens: Tensor
    lanes: tuple[Tensor, Tensor] | None


class Views:
    """Views of a decode state's tensors, each made once: a step would take as long to make them as to compute.

    base `[B, H, K, V]`, keys `[B, R, Hk, K]`, values `[B, R, Hv, V]`, log_decays `[B, R, H]` and cursor `[3]` are
    those of `DecodeState`.
    """

    def __init__(self, base: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor, cursor: Tensor) -> None:
        self.tensors = base, keys, values, log_decays, cursor
        self.places: dict[tuple[int, int], Place] = {}
        with torch.inference_mode(False), torch.no_grad():
            self.base = base.flatten(0, 1)
            self.start, self.count = cursor[0], cursor[1]

    def of(self, base: Tensor, keys: Tensor, values: Tensor, log_decays: Tensor, cursor: Tensor) -> bool:
        """Whether these are the tensors that the views are of."""
        mine = self.tensors
        return mine[0] is base and mine[1] is keys and mine[2] is values and mine[3] is log_decays and mine[4] is cursor

    def place(self, start: int, count: int) -> Place:
        """For `start + count` below the number of slots."""
        found = self.places.get((start, count))
        if found is None:
            if len(self.places) >= MOST_PLACES:
                self.places.clear()
            found = self.places[start, count] = self._make(start, count)
        return found

    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, start: int, count: int) -> Place:
        base, *rings, _ = self.tensors
        key, value, decay = (ring.narrow(1, start + count, 1) for ring in rings)
        total = count + 1
        keys, values, log_decays = (ring.narrow(1, start, total) for ring in rings)
        batch, heads = base.shape[:2]
        factors = base.new_empty(batch, heads, total + 1)
        flat = factors.view(batch * heads, 1, total + 1)
        sums = later(total, base.dtype, base.device).expand(batch, -1, -1)
        lanes = None
        if batch == 1 and keys.shape[2] == values.shape[2] == heads and keys.dtype == base.dtype:
            lanes = keys[0].permute(1, 2, 0), values[0].transpose(0, 1)
        return Place(
            key, value, decay, keys, values, log_decays.mT, sums,
            factors, flat.narrow(2, 0, 1), flat.narrow(2, 1, total), lanes,
        )  # fmt: skip


@full_precision
def step_one(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, views: Views, scale: float, buffer: int, keep: int
) -> Tensor | None:
    """As `torch_step.step` for one token, or None, with nothing done, where the ring is at its end."""
    base, keys, values, log_decays, cursor = views.tensors
    start, count, _ = cursor.tolist()
    if start + count >= keys.shape[1]:
        return None
    batch, heads, _, value_dim = base.shape
    here = views.place(start, count)
    here.key.copy_(k)
    here.value.copy_(v)
    if log_decay is None:
        here.decay.zero_()
    else:
        here.decay.copy_(log_decay if log_decay.shape[-1] == heads else per_token(log_decay, log_decays, 1))

    torch.bmm(here.log_decays, here.later, out=here.factors).exp_()
    query = in_lanes(q, heads, base.dtype)
    key, value = here.lanes or (in_lanes(here.keys, heads, base.dtype).mT, in_lanes(here.values, heads, base.dtype))
    weights = torch.bmm(query, key).mul_(here.of_tokens)
    out = torch.bmm(query, views.base).mul_(here.of_state).baddbmm_(weights, value, beta=scale, alpha=scale)

    total = count + 1
    fold = 0 if total <= buffer else min(count, total - max(keep, 1))
    if fold:
        fold_held(base, *(ring.narrow(1, start, fold) for ring in (keys, values, log_decays)))
        views.start.fill_((start + fold) % keys.shape[1])
    views.count.fill_(total - fold)
    out = out.view(batch, 1, heads, value_dim)
    return out if q.dtype == base.dtype else out.to(q.dtype)
