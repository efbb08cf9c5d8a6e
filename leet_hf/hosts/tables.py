"""Rope of remote code that keeps tables, cos and sin of every position, a row each: by the tables, or without them.

Tables are no part of a checkpoint, and `from_pretrained`, which makes models on the meta device, leaves them to chance.
Where a module's class makes them by the plain formula, its formula is used and its tables are not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fused.rotary import turned
from ..retnet.positions import rotary_angles, rotary_tables

NEAR = 2.0**-7  # a table that was made, or cast to, bfloat16
COMPARED = 64  # rows of a table


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
    """q and k [B, T, heads, D] with their first channels turned, as many as `rotary` has angles for, in float32.

    rotary: a module for which `tables_lack` is None: of the plain formula, or called with (a tensor, seq_len) to return
    rows of its tables, which it makes longer if need be. method: as `leet_hf.fused.rotary.turned`.
    """
    plain = _plain(rotary)
    if plain is not None:
        cos, sin = rotary_tables(where.ids, rotary_angles(*plain, "rope", q.device), q.dtype)
        return turned(q, k, cos, sin, "rope", method=method)
    length = rotary.max_seq_len_cached if where.length is None else where.length
    wide = torch.promote_types(q.dtype, torch.float32)
    tables = rotary(torch.empty(0, dtype=wide, device=q.device), seq_len=length)
    cos, sin = (table[where.ids].unsqueeze(-2).to(wide) for table in tables)  # [B, T, 1, channels]
    return turned(q, k, cos, sin, "rope_twice", method=method)


def tables_lack(rotary: Any, read: bool = False) -> str | None:
    """Why a rope module can not be used, as the end of a sentence about its owner; None if it can.

    read: whether the host's own code reads its tables, so that the formula does not help.
    """
    names = ("cos_cached", "sin_cached", "max_seq_len_cached")
    lacking = [name for name in names if getattr(rotary, name, None) is None]
    if lacking:
        return f"its rotary_emb has no {', '.join(lacking)}"
    cos, sin = rotary.cos_cached[:COMPARED], rotary.sin_cached[:COMPARED]
    if cos.device.type == "meta":
        return None  # hooks of accelerate hold it; a table that nobody holds is found with the weights
    unfilled = bool((sin[0] != 0).any()) or bool((cos[0] != cos[0, 0]).any()) or not float(cos[0, 0]) > 0
    plain = _plain(rotary)
    if unfilled and (read or plain is None):
        return (
            "its rotary_emb holds no cosines and sines (position 0 is not turned by 0): they are not in the "
            "checkpoint, so make them again after loading (module._set_cos_sin_cache)"
        )
    if unfilled or read or plain is None:
        return None
    rows = torch.arange(len(cos), device=cos.device)[None]
    angles = rotary_angles(*plain, "rope", cos.device)
    for table, held in zip(rotary_tables(rows, angles, torch.float32), (cos, sin), strict=True):
        if held.shape[1] != 2 * len(angles) or bool(((held - table[0].flatten(1).repeat(1, 2)).abs() > NEAR).any()):
            return "its rotary_emb holds other tables than its base and dim make: make them again (_set_cos_sin_cache)"
    return None


def frequencies_lack(base: Any, name: str) -> str | None:
    """Why the rope module `name` of a base model can not be used: loading leaves its frequencies to chance too."""
    held = getattr(getattr(base, name, None), "inv_freq", None)
    if not isinstance(held, Tensor) or held.device.type == "meta" or not held.numel():
        return None
    fall = held.detach().double().flatten()  # of every published scaling: from about 1 down
    if bool((fall > 0).all()) and bool((fall <= 2).all()) and bool((fall[1:] <= fall[:-1]).all()):
        return None
    return (
        f"its {name}.inv_freq holds no frequencies of a rope: they are not in the checkpoint, so make them again after "
        f"loading (module.inv_freq.copy_(module.rope_init_fn(module.config, device)[0]), where it has that function)"
    )


def _plain(rotary: Any) -> tuple[int, float] | None:
    """(dim, base) where angles are `base^(-2i/dim)` per position; None where a class derived from it scales them."""
    makers = _makers(type(rotary))
    dim, base = getattr(rotary, "dim", None), getattr(rotary, "base", None)
    return (int(dim), float(base)) if makers == 1 and dim and base else None


@torch.compiler.assume_constant_result
def _makers(kind: type) -> int:
    """How many classes among a class and its bases make tables: not traced, as not every torch can."""
    return sum("_set_cos_sin_cache" in vars(cls) for cls in kind.__mro__)
