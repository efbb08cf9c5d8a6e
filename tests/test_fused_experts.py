"""Experts of a decode step in two launches, against the host's own loop: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxExperts

pytest.importorskip("triton")

from leet_hf.experts import recordable_experts
from leet_hf.fused.experts import MOST_TOKENS, NAME, experts_forward, misfit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts float32 to bfloat16 where hardware rounds, at each of the four places.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2 if DEVICE == "cpu" else 1e-2, torch.float16: 2e-3}


def experts(hidden: int = 40, inner: int = 56, number: int = 4, top: int = 2, **options: Any) -> MiniMaxExperts:
    config = MiniMaxConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=number, num_experts_per_tok=top, **options
    )
    config._experts_implementation_internal = "eager"
    made = MiniMaxExperts(config)
    torch.manual_seed(0)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return made.to(DEVICE).requires_grad_(False)


def routed(tokens: int, made: MiniMaxExperts, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, made.hidden_dim, device=DEVICE)
    share, index = torch.randn(tokens, made.num_experts, device=DEVICE).softmax(-1).topk(top)
    return x, index, share / share.sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "number", "top"), [(1, 2, 1), (3, 4, 2), (17, 8, 3)])
def test_the_sum_is_the_hosts(tokens: int, number: int, top: int, dtype: torch.dtype, monkeypatch: Any) -> None:
    made = experts(number=number, top=top)
    x, index, share = routed(tokens, made, top)
    want = made.double()(x.double(), index, share.double())
    made = made.to(dtype)
    empty = torch.empty_like

    def poisoned(like: torch.Tensor) -> torch.Tensor:
        return empty(like).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)
    got = experts_forward(made, x.to(dtype), index, share)
    assert got.dtype == dtype and got.shape == x.shape
    assert ((got.double() - want).norm() / want.norm()).item() <= LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "number", "top"), [(1, 2048, 4608, 2, 1), (64, 1024, 384, 64, 8)]
)
def test_large_ones_on_a_gpu(tokens: int, hidden: int, inner: int, number: int, top: int) -> None:
    made = experts(hidden, inner, number, top)
    x, index, share = routed(tokens, made, top)
    want = made.double()(x.double(), index, share.double())
    got = experts_forward(made.bfloat16(), x.bfloat16(), index, share)
    assert ((got.double() - want).norm() / want.norm()).item() <= 1e-2
    assert torch.equal(got, experts_forward(made, x.bfloat16(), index, share))


def test_what_does_not_fit_says_why() -> None:
    assert "more than" in str(misfit(experts(), MOST_TOKENS + 1))
    assert "another than silu" in str(misfit(experts(hidden_act="gelu"), 1))
    biased = experts()
    biased.has_bias = True
    assert "without bias" in str(misfit(biased, 1))
    turned = experts()
    turned.down_proj.data = turned.down_proj.data.mT.contiguous().mT
    assert "not contiguous" in str(misfit(turned, 1))
    if DEVICE == "cpu":
        assert "not on a CUDA device" in str(misfit(experts(), 1))


@pytest.mark.gpu
def test_the_best_comes_first() -> None:
    made = experts().bfloat16()
    base = torch.nn.ModuleList([made])
    base.config = made.config  # type: ignore[assignment]
    assert recordable_experts(base, 2)[0][0] == NAME
    assert NAME not in recordable_experts(base, MOST_TOKENS + 1)[0]
