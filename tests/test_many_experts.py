"""Experts of many tokens in fewer passes: the host's sums and gradients, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

pytest.importorskip("triton")

import tiny
from leet_hf import patch_model
from leet_hf.fused import many_experts
from leet_hf.fused.many_experts import Summed, many_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def experts_of(dtype: torch.dtype, **changes: Any) -> Any:
    """Experts of a patched model: hidden 64."""
    model = patch_model(tiny.model(**changes)).to(DEVICE, dtype)
    model.set_experts_implementation("grouped_mm")
    return model.model.layers[1].mlp.experts


def routed(tokens: int, experts: int, top: int, dtype: torch.dtype, share: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, experts, generator=generator).softmax(-1)
    chosen, index = scores.topk(top)
    x = torch.randn(tokens, 64, generator=generator).to(DEVICE, dtype)
    return [x, index.to(DEVICE), (chosen / chosen.sum(-1, keepdim=True)).to(DEVICE, share or torch.float32)]


def of_class(experts: Any, *arguments: Tensor, implementation: str = "grouped_mm") -> Tensor:
    experts.config._experts_implementation = implementation
    try:
        return type(experts).forward(experts, *arguments)
    finally:
        experts.config._experts_implementation = "grouped_mm"


def gradients(experts: Any, forward: Any, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of input, shares and weights."""
    x, index, share = given[0].detach().requires_grad_(), given[1], given[2].detach().requires_grad_()
    out = forward(experts, x, index, share)
    aim = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out, *torch.autograd.grad(mse_loss(out, aim), [x, share, experts.gate_up_proj, experts.down_proj])]


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize(("number", "top"), [(2, 1), (4, 2), (5, 5)])
def test_sums_and_gradients_of_the_host(number: int, top: int, tokens: int) -> None:
    experts = experts_of(torch.float32, num_local_experts=number, num_experts_per_tok=top)
    given = routed(tokens, number, top, torch.float32)
    got = gradients(experts, many_tokens, given)
    want = gradients(experts, lambda *a: of_class(*a, implementation="eager"), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_expert_no_token_chose() -> None:
    experts = experts_of(torch.float32, num_local_experts=4, num_experts_per_tok=1)
    given = routed(9, 4, 1, torch.float32)
    given[1].fill_(2)
    got = gradients(experts, many_tokens, given)
    want = gradients(experts, lambda *a: of_class(*a, implementation="eager"), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not got[3][[0, 1, 3]].any() and got[3][2].any()


@pytest.mark.parametrize("share", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_another_process_are_left_out(share: torch.dtype) -> None:
    """Rows behind the last expert's hold nothing that may be read, forward or backward."""
    tokens, top, width = 6, 2, 40
    place = torch.randperm(tokens * top, generator=torch.Generator().manual_seed(0)).view(tokens, top).to(DEVICE)
    rows = torch.randn(tokens * top, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    rows[8:] = float("nan")
    shares = torch.rand(tokens, top, generator=torch.Generator().manual_seed(2)).to(DEVICE, share)
    end = torch.tensor([8], dtype=torch.int32, device=DEVICE)
    rows.requires_grad_()
    shares.requires_grad_()
    out = Summed.apply(rows, place, end, shares)
    there = (place < 8)[..., None]
    chosen = torch.where(there, rows.detach().float()[place], 0)
    torch.testing.assert_close(out.float(), (chosen * shares.float()[..., None]).sum(1), rtol=0.02, atol=0.02)
    out.float().sum().backward()
    want = torch.where(there[..., 0], chosen.sum(-1), 0)
    torch.testing.assert_close(shares.grad.float(), want, rtol=0.02, atol=0.05)
    assert torch.isfinite(rows.grad).all() and not rows.grad[8:].any()


def test_indices_past_the_experts() -> None:
    experts = experts_of(torch.float32, num_local_experts=3, num_experts_per_tok=2)
    x, index, share = routed(11, 3, 2, torch.float32)
    elsewhere = index == 1
    with torch.no_grad():
        got = many_tokens(experts, x, torch.where(elsewhere, 3, index), share)
        want = of_class(experts, x, index, torch.where(elsewhere, 0, share), implementation="eager")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_what_is_left_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(torch.float32, num_local_experts=4, num_experts_per_tok=2)
    monkeypatch.setattr(many_experts, "many_tokens", lambda *_: pytest.fail("not for these"))
    given = routed(5, 4, 2, torch.float32)
    assert torch.equal(experts(*given), of_class(experts, *given))  # float32, and here perhaps a CPU


@pytest.mark.gpu
@pytest.mark.parametrize(("number", "top"), [(2, 1), (8, 2), (64, 6)])
@pytest.mark.parametrize("tokens", [2, 65, 4096])
def test_on_a_gpu(tokens: int, number: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(torch.bfloat16, num_local_experts=number, num_experts_per_tok=top)
    given = routed(tokens, number, top, torch.bfloat16)
    used: list[int] = []

    def counted(*arguments: Any) -> Tensor:
        used.append(1)
        return many_tokens(*arguments)

    monkeypatch.setattr(many_experts, "many_tokens", counted)
    got = gradients(experts, lambda module, *a: module(*a), given)
    assert used
    host = gradients(experts, of_class, given)
    exact = gradients(experts.double(), lambda *a: of_class(*a, implementation="eager"), [
        x.double() if x.is_floating_point() else x for x in given
    ])  # fmt: skip
    for ours, theirs, want in zip(got, host, exact, strict=True):
        size = want.square().mean().sqrt()
        error, of_host = ((x.double() - want).square().mean().sqrt() / size for x in (ours, theirs))
        assert error <= 1.5 * of_host + 1e-3
