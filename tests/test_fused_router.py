"""Routers of experts in one launch: in Triton's interpreter and on a GPU, and which modules get it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

pytest.importorskip("triton")

from leet_hf.fused.router import formula, is_formula, routed, routers_in_one_launch
from leet_hf.fused.spared import Spared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top"), [(1, 2, 1), (3, 5, 2), (17, 64, 8), (2, 3, 3)])
@pytest.mark.parametrize("width", [24, 300])
def test_is_the_formula(tokens: int, experts: int, top: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens + width)
    # whole numbers: logits are exact in every dtype, and ties are drawn often
    x = torch.randint(-2, 3, (tokens, width), device=DEVICE).to(dtype)
    weight = torch.randint(-1, 2, (experts, width), device=DEVICE).to(dtype) / 4
    logits, share, index = routed(x, weight, top)
    want_logits, want_share, want_index = formula(x, weight, top)
    assert (logits.dtype, share.dtype, index.dtype) == (dtype, torch.float32, torch.int64)
    assert torch.equal(logits, want_logits)
    torch.testing.assert_close(share, want_share, rtol=1e-5, atol=1e-7)
    if len(set(want_logits.flatten().tolist())) == want_logits.numel():
        assert torch.equal(index, want_index)
    torch.testing.assert_close(logits.gather(1, index), want_logits.gather(1, want_index))
    assert all(len(set(row)) == top for row in index.tolist())


def test_nan_chooses_an_expert_there_is() -> None:
    x = torch.full((2, 24), float("nan"), device=DEVICE)
    _, share, index = routed(x, torch.ones(3, 24, device=DEVICE), 2)
    assert share.isnan().all() and int(index.min()) >= 0 and int(index.max()) < 3


def test_which_classes_are_the_formula() -> None:
    assert is_formula(MiniMaxTopKRouter.forward) and is_formula(MixtralTopKRouter.forward)

    class Sigmoid(MiniMaxTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits = nn.functional.linear(hidden_states, self.weight)
            share, index = logits.sigmoid().float().topk(self.top_k)
            return logits, share, index

    assert not is_formula(Sigmoid.forward)
    assert not is_formula(nn.Linear.forward)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_of_a_model(dtype: torch.dtype) -> None:
    router = MiniMaxTopKRouter(MiniMaxConfig(hidden_size=2048, num_local_experts=8, num_experts_per_tok=2))
    nn.init.normal_(router.weight, std=0.05)
    router = router.to("cuda", dtype)
    x = torch.randn(3, 2048, device="cuda", dtype=dtype)
    with torch.no_grad():
        want = router(x)
        with routers_in_one_launch(nn.ModuleList([router])):
            assert "forward" in router.__dict__
            got = router(x)
    assert "forward" not in router.__dict__
    assert torch.equal(got[2], want[2])
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_products_with_one_are_spared() -> None:
    x, whole = torch.randn(3), torch.arange(3)
    with Spared():
        assert x * 1 is x and 1.0 * x is x
        assert (x * 2).data_ptr() != x.data_ptr() and torch.equal(x * torch.ones(3), x)
        assert (whole * 1.0).dtype == torch.float32
    assert x * 1 is not x
