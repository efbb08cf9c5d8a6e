"""Experts of one token on a CPU: the host's sum, and whom its forward is left to where it is not that case."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxExperts

import tiny
from leet_hf import patch_model, patch_report, unpatch_model
from leet_hf.fused import few_experts
from leet_hf.fused.expert_binding import ExpertsBinding, experts_of
from leet_hf.versions import CACHE, cache_of
from patching import IDS, outputs, same, snapshot

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Calls:
    """Stands for `one_token` and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.inner = 0, few_experts.one_token
        monkeypatch.setattr(few_experts, "one_token", self)

    def __call__(self, *arguments: Any) -> torch.Tensor:
        self.count += 1
        return self.inner(*arguments)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def patched(**changes: Any) -> Any:
    """Experts of a patched model, in grouped_mm as they come, without gradients."""
    model = patch_model(tiny.model(**changes)).requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    return model.model.layers[1].mlp.experts


def routed(tokens: int = 1, experts: int = 4, top: int = 2, hidden: int = 64) -> Routed:
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, experts, generator=generator).softmax(-1)
    share, index = scores.topk(top)
    return torch.randn(tokens, hidden, generator=generator), index, share / share.sum(-1, keepdim=True)


def of_class(experts: Any, *arguments: Any) -> torch.Tensor:
    return type(experts).forward(experts, *arguments)


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("number", "top"), [(2, 1), (4, 2), (5, 5)])
def test_the_sum_is_the_hosts(number: int, top: int, act: str, calls: Calls) -> None:
    experts = patched(num_local_experts=number, num_experts_per_tok=top, hidden_act=act)
    given = routed(1, number, top)
    got = experts(*given)
    assert calls.count == 1
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        experts.config._experts_implementation = implementation
        torch.testing.assert_close(got, of_class(experts, *given), rtol=1e-5, atol=1e-6)


def test_logits_of_stock_token_by_token(calls: Calls) -> None:
    model, stock = patch_model(tiny.model()), tiny.model()
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :5], use_cache=True))
        assert calls.count == 0, "several tokens are sorted as ever"
        for place in range(5, 12):
            logits = model(IDS[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits
        same(logits[:, -1], stock(IDS[:, :12]).logits[:, -1])
    assert calls.count == 7 * 4


# Whom the forward is left to.


def other_call(name: str, experts: Any) -> Routed:
    """Changes the experts or the call; gives the arguments."""
    x, index, share = routed()
    if name == "two tokens":
        return routed(2)
    if name == "eager":
        experts.config._experts_implementation = "eager"
    elif name == "bfloat16":
        experts.bfloat16()
        x = x.bfloat16()
    elif name == "gradient of x":
        x.requires_grad_()
    elif name == "gradient of weights":
        experts.down_proj.requires_grad_()
    elif name == "gradient of shares":
        share.requires_grad_()
    return x, index, share


@pytest.mark.parametrize(
    "name", ["two tokens", "eager", "bfloat16", "gradient of x", "gradient of weights", "gradient of shares"]
)
def test_other_calls_are_the_class_s_own(name: str, calls: Calls) -> None:
    experts = patched()
    given = other_call(name, experts)
    got, want = experts(*given), of_class(experts, *given)
    assert calls.count == 0 and torch.equal(got, want) and got.requires_grad == want.requires_grad


def test_a_gate_of_somebody_else_is_kept(calls: Calls) -> None:
    experts = patched()
    experts._apply_gate = lambda both: both.chunk(2, dim=-1)[0]
    given = routed()
    torch.testing.assert_close(experts(*given), of_class(experts, *given))
    assert calls.count == 1


@pytest.mark.parametrize("flag", ["has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel"])
def test_experts_of_another_form_are_not_taken(flag: str, calls: Calls) -> None:
    made = MiniMaxExperts(MiniMaxConfig(hidden_size=8, intermediate_size=8, num_local_experts=2))
    assert [module for module, _ in experts_of(made)] == [made]
    setattr(made, flag, True)
    assert experts_of(made) == []
    experts = patched()  # and the same after patching
    seen: list[Any] = []
    experts.config._experts_implementation = "grouped_mm"
    setattr(experts, flag, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts), "forward", lambda self, *a: seen.append(a))
        experts(*routed())
    assert len(seen) == 1 and calls.count == 0


class Other(MiniMaxExperts):
    def forward(self, *args: Any) -> torch.Tensor:
        return super().forward(*args) + 1


def test_a_class_with_a_forward_of_its_own_is_not_taken() -> None:
    assert experts_of(Other(MiniMaxConfig(hidden_size=8, intermediate_size=8, num_local_experts=2))) == []


def test_under_autocast_and_traced(calls: Calls) -> None:
    experts, given = patched(), routed()
    want = experts(*given)
    assert calls.count == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(experts(*given), want, rtol=2e-2, atol=2e-2)
    experts.config._experts_implementation = "batched_mm"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert experts(*(mode.from_tensor(x) for x in given)).shape == want.shape
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: experts(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), want, rtol=1e-5, atol=1e-6)
    assert calls.count == 1


# The patch.


def test_report_hooks_copies_and_unpatching(calls: Calls) -> None:
    model = tiny.model()
    before = snapshot(model)
    assert "experts: 4 to be in fewer passes, for a token on a CPU, many on CUDA" in patch_report(model).host
    assert "experts: 4 in fewer passes, for a token on a CPU, many on CUDA" in patch_report(patch_model(model)).host
    experts = model.model.layers[0].mlp.experts
    seen: list[Any] = []
    handle = experts.register_forward_hook(lambda module, *_: seen.append(module))
    want = outputs(model)
    handle.remove()
    assert seen == [experts]
    copied = copy.deepcopy(model)
    theirs = copied.model.layers[0].mlp.experts
    assert theirs.forward.args[0] is theirs and isinstance(theirs._leet, ExpertsBinding)
    same(outputs(copied), want)
    experts._forward_hooks.clear()
    assert snapshot(unpatch_model(model)).keys() == before.keys()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_experts_somebody_replaced_stay() -> None:
    model = tiny.model()
    experts = model.model.layers[0].mlp.experts
    mine = experts.forward = lambda *a: type(experts).forward(experts, *a)
    assert "experts: 3 in fewer passes, for a token on a CPU, many on CUDA" in patch_report(patch_model(model)).host
    assert experts.forward is mine and unpatch_model(model).model.layers[0].mlp.experts.forward is mine
