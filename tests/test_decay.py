"""The published decay formulas, against the code or the numbers they were published as."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import tiny
from leet_hf import decay


@pytest.mark.parametrize("heads", [1, 4, 6, 64])
@pytest.mark.parametrize("layer, layers", [(0, 4), (3, 4), (79, 80), (0, 1)])
def test_minimax_is_what_transformers_computes(heads: int, layer: int, layers: int) -> None:
    model = tiny.model("all-linear", num_attention_heads=heads, num_key_value_heads=heads)
    module = model.model.layers[0].self_attn
    module.layer_idx, module.num_hidden_layers = layer, layers
    theirs = module.get_slope_rate().flatten().double()
    ours = torch.tensor(decay.minimax(heads, layer, layers), dtype=torch.float64)
    torch.testing.assert_close(-theirs, ours, rtol=2e-6, atol=1e-12)


def test_alibi_slopes() -> None:
    """8 heads as printed in the paper (section 3); 12 as its code gives them: those of 8, then every second of 16."""
    assert decay.alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    sixteen = [2 ** (-i / 2) for i in range(1, 17)]
    assert decay.alibi_slopes(12) == pytest.approx([*(2.0**-i for i in range(1, 9)), *sixteen[0:8:2]])
    assert len(decay.alibi_slopes(80)) == len(set(decay.alibi_slopes(80))) == 80


def test_minimax_text_01() -> None:
    log_decays = decay.minimax_text_01(12, 3, 8)
    assert log_decays == pytest.approx([-slope * (1 - 3 / 7 + 1e-5) for slope in decay.alibi_slopes(12)])
    with pytest.raises(ValueError, match="layers is 1"):
        decay.minimax_text_01(4, 0, 1)


def test_retnet() -> None:
    log_decays = decay.retnet(40)
    assert log_decays[:2] == pytest.approx([math.log(31 / 32), math.log(63 / 64)])
    assert all(a < b < 0 for a, b in itertools.pairwise(log_decays)), "every head has its own decay"
    assert (1 - torch.tensor(2.0) ** (-5 - torch.arange(40)) == 1)[20:].all(), "which float32 would have lost"


def test_retnet_language_model() -> None:
    got = torch.tensor(decay.retnet_language_model(8), dtype=torch.float64)
    ends = torch.linspace(math.log(1 / 32), math.log(1 / 512), 8, dtype=torch.float64)
    torch.testing.assert_close(got, torch.log(1 - torch.exp(ends)))
    assert decay.retnet_language_model(1) == pytest.approx((math.log(31 / 32),))
