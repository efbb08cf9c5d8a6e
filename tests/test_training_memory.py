"""What autograd keeps of a patched model's forward: counted, and gradients that are the same without it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import tiny
from leet_hf import layer, patch_model, patch_report, unpatch_model
from leet_hf.fused import glu, silu_split
from leet_hf.fused.expert_gate import apply_gate
from leet_hf.fused.remade import remake
from leet_hf.fused.route import route
from patching import snapshot

IDS = torch.tensor(tiny.prompts((12, 12)))
WAYS = ["torch", "kernels"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways around an operator by torch: torch's own, or the kernels in Triton's interpreter."""
    if request.param == "kernels":
        pytest.importorskip("triton")
        for module in (glu, silu_split):
            monkeypatch.setattr(module, "route", lambda method, *tensors: route("triton", *tensors))
    return request.param


def model(**changes: Any) -> Any:
    made = tiny.model(**changes).train()
    made.set_experts_implementation("grouped_mm")
    return made


def step(model: Any, ids: Tensor = IDS, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def forget_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "remake", lambda *arguments: False)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """References to the storages of the operator's q, in the order of its calls."""
    seen: list[StorageWeakRef] = []
    inner = layer.attend

    def attend(q: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(StorageWeakRef(q.untyped_storage()))
        return inner(q, *arguments, **options)

    monkeypatch.setattr(layer, "attend", attend)
    return seen


def live(function: Callable[[], Any]) -> int:
    """Bytes that a call leaves allocated while its result lives."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    assert result is not None
    return sum(event.self_cpu_memory_usage for event in profile.events())


def test_q_k_and_v_are_not_kept(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched, seen = patch_model(model()), watch(monkeypatch)
    loss = patched(IDS, labels=IDS, use_cache=False).loss
    assert len(seen) == 3 and all(storage.expired() for storage in seen)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in patched.parameters() if p.grad is not None]
    loss.backward()
    for a, b in zip(once, (p.grad for p in patched.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(2 * a, b)
    del loss, seen[:]
    forget_nothing(monkeypatch)
    loss = patched(IDS, labels=IDS, use_cache=False).loss
    assert loss.requires_grad and len(seen) == 3 and not any(storage.expired() for storage in seen)


@pytest.mark.parametrize("how", ["plain", "autocast", "reentry", "no reentry", "padded", "packed"])
def test_gradients_bit_for_bit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for forgetting in (True, False):
        if not forgetting:
            forget_nothing(monkeypatch)
        patched = patch_model(model())
        if "reentry" in how:
            patched.gradient_checkpointing_enable({"use_reentrant": how == "reentry"})
            patched.enable_input_require_grads()
        options: dict[str, Any] = {}
        if how == "padded":
            options["attention_mask"] = torch.ones_like(IDS).index_fill_(1, torch.arange(3), 0)
        if how == "packed":
            options["position_ids"] = (torch.arange(IDS.shape[1]) % 5)[None].expand_as(IDS)
        ids = IDS[:1] if how == "packed" else IDS
        options = {name: value[: len(ids)] for name, value in options.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found.append(step(patched, ids, **options))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_lora_and_frozen_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for forgetting in (True, False):
        if not forgetting:
            forget_nothing(monkeypatch)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False)
        found.append(step(peft.get_peft_model(patch_model(model()), config)))
    assert len(found[0]) == 1 + 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_node_of_another_function_keeps_its_tensors() -> None:
    x = torch.randn(3, requires_grad=True)
    q = x * 2
    assert not remake(q.exp(), (q,), lambda: (q,))
    assert not remake(x.detach(), (q,), lambda: (q,))
    with torch.autograd.graph.save_on_cpu():
        patched = patch_model(model())
        hooked = step(patched)
    assert all(torch.equal(a, b) for a, b in zip(hooked, step(patch_model(model())), strict=True))


def test_bytes_a_step_keeps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched against stock; and what each of both, q k v and the experts' gate, saves of it."""
    patched, stock = patch_model(model()), model()

    def run(model: Any) -> int:
        model(IDS, use_cache=False)
        return live(lambda: model(IDS, labels=IDS, use_cache=False).loss)

    ours, theirs = run(patched), run(stock)
    assert ours < 0.85 * theirs, f"{ours} of {theirs} bytes"
    forget_nothing(monkeypatch)
    unit = IDS.numel() * 64 * 4  # a tensor of the hidden width
    assert run(patched) - ours > 0.7 * 3 * 3 * unit  # the profiler counts what is freed meanwhile, too
    if way == "kernels":
        before = run(patched)
        for module in patched.modules():
            module.__dict__.pop("_apply_gate", None)
        assert run(patched) - before > 0.7 * 4 * 2 * unit  # silu(gate) of two experts a token


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "MiniMaxExperts"]


def test_gates_of_experts_are_put_there_and_taken_off() -> None:
    made = model()
    before = snapshot(made)
    assert "experts: gates of 4 to be fused on CUDA" in patch_report(made).host
    patch_model(made)
    assert "experts: gates of 4 fused on CUDA" in patch_report(made).host
    for experts in experts_of(copy.deepcopy(made)):
        assert experts._apply_gate.func is apply_gate and experts._apply_gate.args == (experts,)
    assert snapshot(unpatch_model(made)) == before


def test_gates_of_somebody_elses_are_left_alone() -> None:
    made = model()
    first, second, *_ = experts_of(made)
    first._apply_gate = own = lambda both: both.chunk(2, dim=-1)[0]
    second.act_fn = nn.Tanh()
    patch_model(made)
    assert first._apply_gate is own and "_apply_gate" not in second.__dict__
    assert "experts: gates of 2 fused on CUDA" in patch_report(made).host
    unpatch_model(made)
    assert first._apply_gate is own


def test_a_step_is_that_of_stock(way: str) -> None:
    stock = model()
    for a, b in zip(step(patch_model(model())), step(stock), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
