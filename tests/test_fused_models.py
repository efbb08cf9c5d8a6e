"""Whole models with the kernels, in Triton's interpreter without a GPU, are what they are with torch alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import tiny_retnet
from leet_hf import patch_model
from leet_hf.fused import glu, rotary, silu_split
from leet_hf.fused.route import route

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.replace("aten::", "")] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of this package, around an operator by torch, as the interpreter needs long for that one."""
    for module in (rotary, glu, silu_split):
        monkeypatch.setattr(module, "route", lambda method, *tensors: route("triton", *tensors))


def made(kind: str) -> Any:
    if kind == "minimax":
        return patch_model(tiny.model(), method="torch").to(DEVICE)
    return tiny_retnet.model(kind, method="torch").to(DEVICE)


def trained(kind: str) -> list[torch.Tensor]:
    """Logits, and the gradients of all parameters."""
    model, ids = made(kind), torch.tensor(tiny.prompts((5, 5)), device=DEVICE)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    return [outputs.logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", [*tiny_retnet.KINDS, "minimax"])
def test_logits_and_gradients(kind: str, request: pytest.FixtureRequest) -> None:
    wanted = trained(kind)
    request.getfixturevalue("kernels")
    for a, b in zip(trained(kind), wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("kind", ["fla", "hybrid"])
def test_what_a_forward_launches(kind: str, kernels: None) -> None:
    model, ids = made(kind), torch.tensor(tiny.prompts((3,)), device=DEVICE)
    model(ids)
    with Counted() as counted, torch.no_grad():
        model(ids)
    layers = model.config.num_hidden_layers
    assert counted.calls["leet_hf::rotary"] == counted.calls["leet_hf::gated"] == layers
    # Tables are made once for all layers of a kind, of angles that are kept.
    assert counted.calls["cos"] == counted.calls["sin"] == (2 if kind == "hybrid" else 1)
    assert not any(counted.calls[name] for name in ("stack", "linspace", "reciprocal"))


def test_method_torch_takes_no_kernel() -> None:
    ids = torch.tensor(tiny.prompts((3,)), device=DEVICE)
    with Counted() as counted, torch.no_grad():
        made("fla")(ids)
    assert counted.calls["silu"] and not any(name.startswith("leet_hf::") for name in counted.calls)


def test_lora_on_the_packed_projection_learns(kernels: None) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("minimax"), peft.LoraConfig(r=2, target_modules=["qkv_proj"]))
    ids = torch.tensor(tiny.prompts((5,)), device=DEVICE)
    model(ids, labels=ids).loss.backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(grad is not None for grad in learning.values())
    assert all(grad.abs().sum() > 0 for name, grad in learning.items() if "lora_B" in name)  # A learns once B is not 0
