"""Rope by the tables that modules of remote code keep: cos and sin of every position, a row each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fused.rotary import turned


class Places(NamedTuple):
    """Where tokens are. ids: positions [B, T]. length: one more than the highest, None where only the device knows."""

    ids: Tensor
    length: int | None


def places(position_ids: Tensor, cache: Any) -> Places:
    """The places of a forward. Asks the device once, unless a graph is traced or the cache has a fixed length."""
    fixed = None
    for layer in () if cache is None else cache.layers:  # no generator: not every torch traces the names it shares
        fixed = fixed or getattr(layer, "max_cache_len", None)
    if fixed is not None or torch.compiler.is_compiling():
        return Places(position_ids, fixed)
    return Places(position_ids, int(position_ids.max()) + 1)


def turned_by_tables(
    q: Tensor, k: Tensor, rotary: Any, where: Places, *, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q and k [B, T, heads, D] with their first channels turned, as many as the tables of `rotary` have, in float32.

    rotary: a module called with (a tensor, seq_len) that returns rows of its tables, which it makes longer if need be.
    method: as `leet_hf.fused.rotary.turned`.
    """
    length = rotary.max_seq_len_cached if where.length is None else where.length
    wide = torch.promote_types(q.dtype, torch.float32)
    tables = rotary(torch.empty(0, dtype=wide, device=q.device), seq_len=length)
    cos, sin = (table[where.ids].unsqueeze(-2).to(wide) for table in tables)  # [B, T, 1, channels]
    return turned(q, k, cos, sin, "rope_twice", method=method)


def tables_lack(rotary: Any) -> str | None:
    """Why the tables of a rope module can not be used, as the end of a sentence about its owner; None if they can."""
    names = ("cos_cached", "sin_cached", "max_seq_len_cached")
    lacking = [name for name in names if getattr(rotary, name, None) is None]
    if lacking:
        return f"its rotary_emb has no {', '.join(lacking)}"
    cos, sin = rotary.cos_cached[0], rotary.sin_cached[0]
    if cos.device.type == "meta":
        return None  # hooks of accelerate hold it; a table that nobody holds is found with the weights
    if bool((sin != 0).any()) or bool((cos != cos[0]).any()) or not float(cos[0]) > 0:
        return (
            "its rotary_emb holds no cosines and sines (position 0 is not turned by 0): they are not in the "
            "checkpoint, so make them again after loading (module._set_cos_sin_cache)"
        )
    return None
