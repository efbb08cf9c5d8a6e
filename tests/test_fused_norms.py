"""Norm modules of patched models: which ones get the kernel, what stays as it is, results in Triton's interpreter."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.minimax.modeling_minimax import MiniMaxRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import tiny
import tiny_retnet
from fused_cases import COMPILED, with_gradients
from hosts.bailing_layers import BailingMoeV2_5GroupRMSNorm
from leet_hf import DecayLinearAttention, patch_model, patch_report, unpatch_model
from leet_hf.fused import norm as functions
from leet_hf.fused import norms
from leet_hf.fused.norms import NormBinding, gated_norm, norm_binding
from leet_hf.retnet.norms import RetNetRMSNorm
from patching import IDS, lightning, outputs, same, skip_unless_stock_pickles, snapshot

pytest.importorskip("triton")


class Calls:
    """Stands for the kernel's function and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.inner = 0, functions.by_kernel
        monkeypatch.setattr(functions, "by_kernel", self)

    def __call__(self, *arguments: Any) -> Tensor:
        self.count += 1
        return self.inner(*arguments)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Kernels on the CPU too, whatever the method: as on a GPU, where test_fused_norm_gpu.py does the same."""
    if COMPILED:
        pytest.skip("with a GPU there is no interpreter on the CPU")
    route = functions.route
    monkeypatch.setattr(functions, "route", lambda method, *t: route("triton" if method == "auto" else method, *t))
    monkeypatch.setattr(norms, "formula_only", lambda *_: False)
    return Calls(monkeypatch)


# Which norms there are.


class Scaled(nn.Module):
    """Has all that an RMSNorm has, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Offset(MiniMaxRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight


class Wider(MiniMaxRMSNorm):
    """As a wrapper of FSDP2 is: a class of its own with the forward of the other."""


@pytest.mark.parametrize(
    ("module", "binding"),
    [
        (MiniMaxRMSNorm(8), NormBinding(True)),
        (LlamaRMSNorm(8), NormBinding(True)),
        (T5LayerNorm(8), None),  # casts to the weight's dtype instead
        (Wider(8), NormBinding(True)),
        (Olmo2RMSNorm(8), NormBinding(False)),
        (BailingMoeV2_5GroupRMSNorm(8, 4, 1e-5), NormBinding(True, 4)),
        (GemmaRMSNorm(8), None),  # 1 + weight
        (nn.RMSNorm(8), None),
        (nn.LayerNorm(8), None),
        (Scaled(), None),
        (Offset(8), None),
        (nn.Linear(8, 8), None),
    ],
    ids=lambda x: type(x).__name__,
)
def test_which_norms_are_served(module: nn.Module, binding: NormBinding | None) -> None:
    assert norm_binding(module) == binding


def test_a_norm_that_somebody_changed_is_left_alone() -> None:
    replaced, with_buffer, odd = MiniMaxRMSNorm(8), MiniMaxRMSNorm(8), BailingMoeV2_5GroupRMSNorm(8, 3, 1e-5)
    replaced.forward = lambda x: x
    with_buffer.register_buffer("scale", torch.ones(1))
    assert all(norm_binding(module) is None for module in (replaced, with_buffer, odd))


def test_the_trial_is_the_same_wherever_it_is_made() -> None:
    norms._rounding.cache_clear()
    state = torch.get_rng_state()
    with torch._subclasses.FakeTensorMode(), torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        assert norm_binding(MiniMaxRMSNorm(8)) == NormBinding(True)
    assert torch.equal(torch.get_rng_state(), state)


# Patched models.


def test_report_and_unpatching() -> None:
    model = tiny.model()
    before = snapshot(model)
    assert "norms: 12 to be fused on CUDA" in patch_report(model).host
    assert "norms: 12 fused on CUDA" in patch_report(patch_model(model)).host
    assert sum(isinstance(m.__dict__.get("_leet"), NormBinding) for m in model.modules()) == 12
    assert snapshot(unpatch_model(model)) == before


def test_a_norm_of_somebody_else_stays(kernels: Calls) -> None:
    model = tiny.model()
    want = outputs(model)
    norm = model.model.norm
    mine = norm.forward = lambda x: type(norm).forward(norm, x)
    assert "norms: 11 fused on CUDA" in patch_report(patch_model(model)).host
    same(outputs(model), want)
    assert unpatch_model(model).model.norm.forward is mine


def test_on_the_cpu_the_class_s_own_forward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny.model())
    norm, x = model.model.norm, torch.randn(3, 64)
    calls = Calls(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(norm(x.to(dtype)), type(norm).forward(norm, x.to(dtype)))
    layer, gate = lightning(model)[0], torch.randn(3, 64)
    assert torch.equal(
        gated_norm(layer.norm, x, gate, "sigmoid"), torch.sigmoid(gate) * type(norm).forward(layer.norm, x)
    )
    assert calls.count == 0


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_logits_of_stock(layout: str, kernels: Calls) -> None:
    model = tiny.model(layout)
    want = outputs(model)
    same(outputs(patch_model(model)), want)
    assert kernels.count == 4 * 2 + 1 + len(lightning(model)), "norm and gate of a layer are one"


def test_dtypes_of_stock(kernels: Calls) -> None:
    """The weight's dtype and the input's, together; autocast makes no difference to either."""
    for weight in (torch.float32, torch.bfloat16, torch.float16):
        model = patch_model(tiny.model().to(weight))
        norm = model.model.norm
        for x in (torch.randn(2, 64), torch.randn(2, 64).bfloat16(), torch.randn(2, 64).double()):
            for enabled in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    got, want = norm(x), type(norm).forward(norm, x)
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_stock(checkpointing: bool, kernels: Calls) -> None:
    gradients = []
    for model in (patch_model(tiny.model()), tiny.model()):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert kernels.count >= 12 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_hooks_still_run(kernels: Calls) -> None:
    model = patch_model(tiny.model())
    want = outputs(model)
    seen: list[str] = []
    names = ["model.norm", "model.layers.0.self_attn.norm", "model.layers.1.input_layernorm"]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    same(outputs(model), want)
    assert sorted(seen) == sorted(names)
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        outputs(model)
    finally:
        handle.remove()
    assert seen.count("MiniMaxRMSNorm") == 12, "a hook on all modules sees the norms of layers too"


@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies_have_norms_of_their_own(through: str, kernels: Calls) -> None:
    if through == "pickle":
        skip_unless_stock_pickles()
    model = patch_model(tiny.model())
    copied = copy.deepcopy(model) if through == "deepcopy" else pickle.loads(pickle.dumps(model))
    want = outputs(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("_leet"), NormBinding):
            module.weight.data.zero_()
    count = kernels.count
    same(outputs(copied), want)
    assert kernels.count > count
    assert copied.model.norm.forward.args[0] is copied.model.norm
    assert snapshot(unpatch_model(copied)).keys() == snapshot(model).keys()
    assert not any("forward" in module.__dict__ for module in copied.modules())


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    model = patch_model(tiny.model(), method="triton")
    layer = lightning(model)[0]
    x, gate = torch.randn(2, 5, 64), torch.randn(2, 5, 64)

    def run(x: Tensor, gate: Tensor) -> tuple[Tensor]:
        return (gated_norm(layer.norm, model.model.norm(x), gate, "sigmoid", method="triton"),)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [with_gradients(f, (x, gate), (x,)) for f in (compiled, run)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# leet_hf's own layers.


@pytest.mark.parametrize("gate", ["swish", "sigmoid", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_linear_attention(gate: str | None, dtype: torch.dtype, kernels: Calls) -> None:
    torch.manual_seed(0)
    layer = DecayLinearAttention(32, 2, gate=gate, value_dim=24).to(dtype)
    x, out = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 32).to(dtype)
    nn.init.normal_(layer.norm.weight)
    results = []
    for method in ("auto", "torch"):
        layer.method = method
        layer.zero_grad()
        results.append([*with_gradients(lambda x: (layer(x)[0],), (x,), (out,))])
    assert kernels.count == 1
    for a, b in zip(*results, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("kind", tiny_retnet.KINDS)
@torch.no_grad()
def test_retnet(kind: str, kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_retnet.model(kind)
    got, count = model(IDS).logits, kernels.count
    own = [module for module in model.modules() if isinstance(module, RetNetRMSNorm)]
    assert count == len(own), "each once; a gate takes no kernel of its own"
    seen: list[Any] = []
    for norm in own:
        norm.register_forward_hook(lambda module, *_: seen.append(module))
    hooked = model(IDS).logits
    assert sorted(map(id, seen)) == sorted(map(id, own)) and kernels.count == 2 * count
    monkeypatch.setattr(functions, "route", lambda *_: "torch")
    want = model(IDS).logits
    same(got, want)
    same(hooked, want)
    assert kernels.count == 2 * count
