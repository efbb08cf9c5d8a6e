"""Several sequences packed into one row: where they begin, however the caller said so."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .versions import find_packed_sequence_indices


class Packing(NamedTuple):
    """seq_idx int [B, T]: which sequence each token belongs to. positions int64 [B, T]: counted from its beginning."""

    seq_idx: Tensor
    positions: Tensor


def find_packing(
    cu_seqlens: Tensor | None,
    seq_idx: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    tokens: int,
    *,
    look_at_positions: bool,
) -> Packing | None:
    """What is packed, from the bounds [N + 1], the index [B, T] or [1, T], or from positions that restart.

    look_at_positions: whether restarting positions mean packing here, as they do in transformers only without a mask
    and without a past. Raises ValueError where the bounds or the index do not fit [B, T].
    """
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q was given with a batch of {batch} rows: pack all sequences into one row")
        seq_idx = sequence_index(cu_seqlens, tokens)
    elif seq_idx is not None:
        if seq_idx.dim() != 2 or seq_idx.shape[0] not in (1, batch) or seq_idx.shape[1] != tokens:
            raise ValueError(
                f"seq_idx has shape {list(seq_idx.shape)}, must be [{batch}, {tokens}]: give one entry per token"
            )
        seq_idx = seq_idx.expand(batch, -1)
    elif look_at_positions and position_ids is not None and tokens > 1:
        seq_idx = find_packed_sequence_indices(position_ids.expand(batch, -1))
    if seq_idx is None:
        return None
    place = torch.arange(tokens, device=seq_idx.device)
    first = torch.where(beginnings(seq_idx), place, 0).cummax(-1).values
    return Packing(seq_idx, place - first)


def sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Bounds [N + 1] as the index of each token's sequence, int64 [1, tokens]."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), place, right=True)[None]


def beginnings(seq_idx: Tensor) -> Tensor:
    """bool [B, T]: whether a token begins a sequence that another one precedes in its row."""
    first = torch.zeros_like(seq_idx[:, :1], dtype=torch.bool)
    return torch.cat([first, seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)


def sequence_positions(position_ids: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Positions [B, T] from the beginning of each sequence, also where packed ones were numbered through."""
    if seq_idx is None:
        return position_ids
    packing = find_packing(None, seq_idx, None, *seq_idx.shape, look_at_positions=False)
    assert packing is not None
    return packing.positions


def packing_arguments(arguments: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(cu_seq_lens_q, seq_idx) among a forward's keyword arguments."""
    return arguments.get("cu_seq_lens_q"), arguments.get("seq_idx")
