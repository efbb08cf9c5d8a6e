"""Padding and packing where q, k and v meet the state."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from leet_hf.attend import attend
from leet_hf.cache import RecurrentLayer
from leet_hf.packing import find_packing, sequence_index
from leet_linear_attention import linear_attention
from recurrent import HEADS, LOG_DECAY, SPEC, Tokens


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("log_decay", [None, LOG_DECAY, "per token"])
def test_pads_anywhere_change_nothing(log_decay: Any, cached: bool) -> None:
    q, k, v = Tokens()(1, 12)
    decay = -torch.rand(1, 12, HEADS) if log_decay == "per token" else log_decay
    real = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0]).bool()
    poisoned = [x.masked_fill(~real[None, :, None, None], float("nan")) for x in (q, k, v)]
    layer = RecurrentLayer(SPEC, 0) if cached else None
    o, state = attend(*poisoned, decay, mask=real[None].long(), layer=layer, return_state=True)
    short = decay[:, real] if log_decay == "per token" else decay
    want, want_state = linear_attention(*(x[:, real] for x in (q, k, v)), short, output_final_state=True)
    torch.testing.assert_close(o[:, real], want)
    torch.testing.assert_close(state, want_state)
    assert not o[:, ~real].any()


@pytest.mark.parametrize("length", [3, 30])
@pytest.mark.parametrize("cached", ["no", "yes", "recording"])
@pytest.mark.parametrize("by", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_do_not_leak(by: str, cached: str, length: int) -> None:
    """Also empty ones, and decays so slow that nothing would be forgotten by itself."""
    lengths = [length, 0, 2 * length, 1, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = Tokens()(1, sum(lengths))
    decay = torch.full((HEADS,), -1e-6)
    layer = None if cached == "no" else RecurrentLayer(SPEC, 0)
    if cached == "recording":
        layer.activate_past_recording()
    packing = {"cu_seqlens": bounds} if by == "cu_seqlens" else {"seq_idx": sequence_index(bounds, sum(lengths))}
    o, state = attend(q, k, v, decay, layer=layer, return_state=True, **packing)
    for a, b in itertools.pairwise(bounds):
        want, want_state = linear_attention(*(x[:, a:b] for x in (q, k, v)), decay, output_final_state=True)
        torch.testing.assert_close(o[:, a:b], want, rtol=1e-5, atol=1e-5)
        last = want_state if a < b else last  # noqa: F821
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
    undecayed, _ = attend(q, k, v, None, seq_idx=sequence_index(bounds, sum(lengths)))
    torch.testing.assert_close(undecayed, o, rtol=1e-3, atol=1e-3)


def test_a_large_value_before_a_boundary_is_gone_after_it() -> None:
    q, k, v = Tokens()(1, 6)
    v[:, :3] = 1e30
    o, _ = attend(q, k, v, LOG_DECAY, seq_idx=torch.tensor([[0, 0, 0, 5, 5, 5]]))
    want, _ = linear_attention(q[:, 3:], k[:, 3:], v[:, 3:], LOG_DECAY)
    torch.testing.assert_close(o[:, 3:], want)


def test_find_packing() -> None:
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    found = find_packing(bounds, None, None, 1, 5, look_at_positions=False)
    assert found is not None
    assert found.seq_idx.tolist() == [[0, 0, 2, 2, 2]] and found.positions.tolist() == [[0, 1, 0, 1, 2]]
    positions = torch.tensor([[4, 5, 0, 1, 2]])
    found = find_packing(None, None, positions, 2, 5, look_at_positions=True)
    assert found is not None and found.positions.tolist() == [[0, 1, 0, 1, 2]] * 2
    assert find_packing(None, None, positions, 2, 5, look_at_positions=False) is None
    assert find_packing(None, None, torch.arange(3, 8)[None], 2, 5, look_at_positions=True) is None
    with pytest.raises(ValueError, match="cu_seq_lens_q was given with a batch of 2 rows: pack"):
        find_packing(bounds, None, None, 2, 5, look_at_positions=True)
    with pytest.raises(ValueError, match=r"seq_idx has shape \[1, 4\], must be \[1, 5\]"):
        find_packing(None, torch.zeros(1, 4), None, 1, 5, look_at_positions=True)
