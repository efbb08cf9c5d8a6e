"""The kernels of RMSNorm on a GPU: every dtype at sizes of models, CUDA graphs, repeatability, patched models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import tiny
import tiny_retnet
from fused_cases import DTYPES, with_gradients
from leet_hf import DecayLinearAttention, patch_model, unpatch_model
from leet_hf.fused import norm as functions
from leet_hf.fused.norm import rms_norm
from leet_hf.fused.norms import NormBinding
from leet_hf.modes.truth import relative_error
from patching import IDS, lightning, outputs
from test_fused_norm import EPS, arguments, check, run
from test_fused_norms import Calls

pytestmark = pytest.mark.gpu


@contextmanager
def never_waits() -> Iterator[None]:
    """Waiting for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "weight", "activation", "each"),
    [
        ((1, 2048), "contiguous", 1, "sigmoid", True),
        ((1, 2048), "contiguous", 1, None, True),
        ((5000, 2048), "contiguous", 1, "sigmoid", True),
        ((5000, 2048), "packed", 1, None, True),
        ((333, 2048), "odd", 1, "silu", False),
        ((2, 700, 6144), "contiguous", 1, "sigmoid", True),
        ((3, 16384), "contiguous", 1, "sigmoid", True),
        ((517, 16384), "contiguous", 1, "silu", False),
        ((257, 16383), "contiguous", 1, None, False),
        ((2, 625, 8, 512), "contiguous", 1, "silu", False),
        ((2, 625, 8, 512), "heads first", 0, "silu", False),
        ((2, 333, 4, 512), "contiguous", 2, "sigmoid", True),
        ((5000, 16, 64), "contiguous", 1, None, True),
    ],
    ids=str,
)
def test_rms_norm(
    shape: tuple[int, ...], layout: str, weight: int, activation: str | None, each: bool, dtype: torch.dtype
) -> None:
    inputs, dout = arguments(shape, dtype, layout, weight, activation is not None)
    check(inputs, dout, each, activation or "linear")


@pytest.mark.parametrize("shape", [(1, 2048), (5000, 6144), (4096, 8, 512)], ids=str)
def test_repeats_bit_for_bit_and_never_waits(shape: tuple[int, ...]) -> None:
    inputs, dout = arguments(shape, torch.bfloat16, "contiguous", 1, True)
    first = run(inputs, dout, activation="sigmoid")
    with never_waits():
        second = run(inputs, dout, activation="sigmoid")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_a_cuda_graph() -> None:
    inputs, dout = arguments((64, 2048), torch.bfloat16, "contiguous", 1, True)
    leaves = [t.detach().requires_grad_() for t in inputs if t is not None]

    def step() -> tuple[Tensor, ...]:
        out = rms_norm(leaves[0], leaves[1], gate=leaves[2], activation="sigmoid", eps=EPS)
        return out, *torch.autograd.grad(out, leaves, dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, step(), strict=True))


def test_on_the_current_stream() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    want = rms_norm(x, eps=EPS)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = x * 1.0
        got = rms_norm(late, eps=EPS)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)


def test_compiled_whole() -> None:
    torch._dynamo.reset()

    def two(x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        h = rms_norm(x, weight, gate=gate, activation="sigmoid", eps=EPS)
        return (rms_norm(h, eps=EPS, each=False),)

    inputs, dout = arguments((64, 2048), torch.bfloat16, "contiguous", 1, True)
    leaves = tuple(t for t in inputs if t is not None)
    got, want = (with_gradients(f, leaves, (dout,)) for f in (torch.compile(two, fullgraph=True), two))
    assert all(relative_error(a, b) <= 1e-2 for a, b in zip(got, want, strict=True))


# Models.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patched_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = tiny.rounded().cuda()
    ids = IDS.cuda()
    with torch.no_grad():
        truth = copy.deepcopy(stock)(ids, use_cache=False).logits
        model = patch_model(stock.to(dtype))
        calls = Calls(monkeypatch)
        got = model(ids, use_cache=False).logits
        assert calls.count == 4 * 2 + 1 + len(lightning(model))
        assert relative_error(got, truth) <= (1e-4 if dtype == torch.float32 else 0.05)
        unpatch_model(model)(ids, use_cache=False)
    assert calls.count == 4 * 2 + 1 + len(lightning(model))


def test_norms_have_stock_s_dtypes() -> None:
    model = patch_model(tiny.model()).cuda()
    norm = model.model.norm
    assert isinstance(norm._leet, NormBinding)
    for weight in DTYPES:
        norm.to(weight)
        for dtype in (*DTYPES, torch.float64):
            x = torch.randn(3, 64, device="cuda", dtype=dtype)
            for enabled in (False, True):
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
                    got, want = norm(x), type(norm).forward(norm, x)
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


def test_gradients_of_stock() -> None:
    gradients = []
    for model in (patch_model(tiny.model()), tiny.model()):
        model.cuda().train()(IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_hooks_still_run() -> None:
    model = patch_model(tiny.model()).cuda()
    seen: list[str] = []
    names = ["model.norm", "model.layers.0.self_attn.norm", "model.layers.1.input_layernorm"]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(IDS.cuda(), use_cache=False)
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("gate", ["swish", "sigmoid", None])
def test_decay_linear_attention(gate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DecayLinearAttention(256, 4, gate=gate, value_dim=96).cuda()
    x, out = (torch.randn(2, 50, 256, device="cuda") for _ in range(2))
    torch.nn.init.normal_(layer.norm.weight)
    calls = Calls(monkeypatch)
    got = with_gradients(lambda x: (layer(x)[0],), (x,), (out,))
    monkeypatch.setattr(functions, "route", lambda *_: "torch")
    want = with_gradients(lambda x: (layer(x)[0],), (x,), (out,))
    assert calls.count == 1 and all(relative_error(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", tiny_retnet.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retnet(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float32 on the CPU as the formulas are."""
    model = tiny_retnet.model(kind)
    truth = outputs(model)
    model = model.to("cuda", dtype)

    def error() -> float:
        with torch.no_grad():
            return relative_error(model(IDS.cuda(), use_cache=False).logits.cpu(), truth)

    ours = error()
    monkeypatch.setattr(functions, "route", lambda *_: "torch")
    assert ours <= 1.5 * error() + (1e-5 if dtype == torch.float32 else 1e-3)
