"""`causal_linear_decoder`: LeetDecoding's signature and layout, every method and kind of decay, against float64.

The Triton forms run in Triton's interpreter where there is no GPU, at tiny shapes.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch
from torch import Tensor

from leet_linear_attention import available_methods, causal_linear_decoder
from leet_linear_attention.compat import ATTENTION_METHODS
from operator_cases import TOLERANCE, error

NAMES = [
    "vanilla", "lightningAttention2", "lightningAttention2_torch", "FleetAttention", "FleetAttention_torch",
    "causal_dot_product", "causal_dot_product_torch", "recursion", "block-based",
]  # fmt: skip
COMPILED = torch.cuda.is_available()
INTERPRETED = [] if COMPILED else ["lightningAttention2", "FleetAttention", "causal_dot_product"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts float32 to bfloat16 where hardware rounds, which doubles that dtype's error.
LIMIT = TOLERANCE if COMPILED else {**TOLERANCE, torch.bfloat16: 1.5e-2}
# What is passed, and the decay per token it stands for.
KINDS = {
    "plain": (False, False, True),
    "plain-factor": (False, False, False),
    "mask-without-gamma": (True, False, True),
    "mask-without-gamma-factor": (True, False, False),
    "rate": (True, True, True),
    "factor": (True, True, False),
}


def inputs(*shape: int, value_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """q, k `[B, H, T, K]` and v `[B, H, T, V]`."""
    random = torch.Generator().manual_seed(0)
    widths = (shape[-1], shape[-1], value_dim)
    return [torch.randn(*shape[:-1], w, generator=random).div(w**0.25).to(device, dtype) for w in widths]


def gamma_of(kind: str, heads: int) -> tuple[dict[str, object], Tensor]:
    """Arguments of a kind, and the decay per token they stand for, float64 `[H]`."""
    masked, given, need_exp = KINDS[kind]
    values = torch.tensor([0.3, 1e-4, 1.0, 0.05, 0.0, 0.7])[:heads]
    arguments: dict[str, object] = {"is_mask_weight": masked, "is_need_exp": need_exp}
    if not given:
        return arguments, torch.ones(heads, dtype=torch.float64)
    arguments["gamma"] = values
    return arguments, (-values.double()).exp() if need_exp else values.double()


def oracle(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """The definition in float64: sum over i <= t of decay^(t - i) (q_t . k_i) v_i."""
    q, k, v, decay = (x.double() for x in (q, k, v, decay))
    t = torch.arange(q.shape[2], device=q.device)
    apart = t[:, None] - t
    mask = (decay[:, None, None] ** apart.clamp(min=0)).masked_fill(apart < 0, 0.0)
    return (q @ k.transpose(-1, -2) * mask) @ v


def test_signature_is_that_of_leetdecoding() -> None:
    parameters = inspect.signature(causal_linear_decoder).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [
        ("q", inspect.Parameter.empty),
        ("k", inspect.Parameter.empty),
        ("v", inspect.Parameter.empty),
        ("is_mask_weight", False),
        ("gamma", None),
        ("is_need_exp", True),
        ("attn_method", None),
    ]
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    assert sorted(ATTENTION_METHODS) == sorted(NAMES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_every_method_decay_and_dtype(name: str | None, kind: str, dtype: torch.dtype) -> None:
    small = name in INTERPRETED
    heads = 3 if small else 6
    shape, value_dim = ((1, heads, 18, 3), 5) if small else ((2, heads, 150, 24), 40)
    q, k, v = inputs(*shape, value_dim=value_dim, dtype=dtype)
    arguments, decay = gamma_of(kind, heads)
    o = causal_linear_decoder(q, k, v, attn_method=name, **arguments)  # type: ignore[arg-type]
    assert o.shape == (*shape[:3], value_dim) and o.dtype == dtype
    assert error(o, oracle(q, k, v, decay)) <= (LIMIT if small else TOLERANCE)[dtype]


@pytest.mark.parametrize("tokens", [0, 1, 2, 31, 33, 256, 257])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_any_length(name: str | None, tokens: int) -> None:
    if name in INTERPRETED:
        tokens, shape, value_dim = min(tokens, 34), (1, 1), 2
    else:
        shape, value_dim = (2, 2), 12
    q, k, v = inputs(*shape, tokens, 3, value_dim=value_dim)
    gamma = torch.tensor([0.2, 0.01])[: shape[1]]
    o = causal_linear_decoder(q, k, v, True, gamma, True, name)
    assert o.shape == v.shape
    assert error(o, oracle(q, k, v, (-gamma.double()).exp())) <= TOLERANCE[torch.float32]


def test_the_default_takes_long_sequences() -> None:
    """Longer than any block, and the last tokens see nothing but their past: the oracle needs only those."""
    tokens, tail = 20_001, 600
    q, k, v = inputs(1, 2, tokens, 16, value_dim=16)
    gamma = torch.tensor([0.5, 0.2])  # exp(-0.2 * 300) is beyond float32
    o = causal_linear_decoder(q, k, v, True, gamma)
    wanted = oracle(*(x[:, :, -tail:] for x in (q, k, v)), (-gamma.double()).exp())
    assert error(o[:, :, -300:], wanted[:, :, -300:]) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("need_exp", [True, False], ids=["rate", "factor"])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_gradients(name: str | None, need_exp: bool) -> None:
    shape, value_dim = ((1, 2, 11, 3), 2) if name in INTERPRETED else ((2, 3, 70, 8), 12)
    gamma = torch.tensor([0.3, 0.9, 0.0])[: shape[1]]  # a factor of 0 has a gradient too: that of the token before
    leaves = [x.requires_grad_() for x in (*inputs(*shape, value_dim=value_dim), gamma)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    o = causal_linear_decoder(*leaves[:3], True, leaves[3], need_exp, name)
    wanted = oracle(*wide[:3], (-wide[3]).exp() if need_exp else wide[3])
    incoming = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(o, leaves, incoming)
    for what, mine, exact in zip(
        ("q", "k", "v", "gamma"), found, torch.autograd.grad(wanted, wide, incoming.double()), strict=True
    ):
        assert error(mine, exact) <= TOLERANCE[torch.float32], what


@pytest.mark.parametrize("need_exp", [True, False])
def test_shapes_and_dtypes_of_gamma(need_exp: bool) -> None:
    q, k, v = inputs(1, 2, 40, 8, value_dim=8)
    gamma = torch.tensor([0.5, 0.25])  # exact in every dtype
    wanted = causal_linear_decoder(q, k, v, True, gamma, need_exp)
    for given in (gamma[:, None], gamma[:, None, None], gamma.half(), gamma.bfloat16(), gamma.double()):
        assert torch.equal(causal_linear_decoder(q, k, v, True, given, need_exp), wanted)


def test_float64_and_foreign_layouts() -> None:
    q, k, v = (x.double() for x in inputs(2, 3, 50, 7, value_dim=5))
    gamma = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    wanted = oracle(q, k, v, (-gamma).exp())
    # tokens before heads in memory, and a view into wider rows
    q, k = q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([k, k], -1)[..., :7]
    for name in (None, *NAMES):
        assert error(causal_linear_decoder(q, k, v, True, gamma, True, name), wanted) <= TOLERANCE[torch.float64]


def test_heads_after_tokens_without_a_copy() -> None:
    q, k, v = inputs(2, 3, 20, 8, value_dim=4)
    o = causal_linear_decoder(q, k, v)
    assert o.transpose(1, 2).is_contiguous()


def test_traced_into_one_graph() -> None:
    q, k, v = inputs(1, 2, 20, 4, value_dim=4)
    gamma = torch.tensor([0.1, 0.2])
    torch._dynamo.reset()
    traced = torch.compile(causal_linear_decoder, fullgraph=True, backend="aot_eager")
    for name in (None, "vanilla"):
        found, wanted = (f(q, k, v, True, gamma, True, name) for f in (traced, causal_linear_decoder))
        torch.testing.assert_close(found, wanted)


Q, K, V = inputs(2, 3, 9, 4, value_dim=5)
GAMMA = torch.tensor([0.1, 0.2, 0.3])
REFUSED = {
    "gamma without a mask": (
        (Q, K, V, False, GAMMA),
        r"gamma was given with is_mask_weight=False.*mask_weight=True",
    ),
    "gamma of other heads": ((Q, K, V, True, GAMMA[:2]), r"gamma has shape \[2\], must be \[H\] = \[3\]"),
    "gamma per token": ((Q, K, V, True, torch.rand(3, 9)), r"gamma has shape \[3, 9\], must be \[H\] = \[3\]"),
    "one number": ((Q, K, V, True, torch.tensor(0.1)), r"gamma has shape \[\], must be \[H\] = \[3\]"),
    "whole numbers": ((Q, K, V, True, torch.ones(3, dtype=torch.int64)), r"gamma is torch.int64, must be a floating"),
    "another device": ((Q, K, V, True, GAMMA.to("meta")), r"gamma is on meta, must be on q's device cpu"),
    "a growing rate": ((Q, K, V, True, -GAMMA), r"gamma holds -0\.1, must be >= 0 and finite.*rate or a factor"),
    "an infinite rate": ((Q, K, V, True, GAMMA / 0), r"gamma holds inf, must be >= 0 and finite"),
    "a growing factor": ((Q, K, V, True, GAMMA + 0.9, False), r"gamma holds 1\.1, must be from 0 to 1"),
    "no number": ((Q, K, V, True, GAMMA * float("nan"), False), r"gamma holds nan, must be from 0 to 1"),
    "an unknown method": ((Q, K, V, False, None, True, "fleet"), r"attn_method was 'fleet', must be None or one of"),
    "three dimensions": ((Q[0], K, V), r"q has shape \[3, 9, 4\], must be \[B, H, T, K\].*heads come before tokens"),
    "other key heads": ((Q, K[:, :1], V), r"k has shape \[2, 1, 9, 4\], must be \[B, H, T, K\] with q's sizes"),
    "other value tokens": ((Q, K, V[:, :, 1:]), r"v has shape \[2, 3, 8, 5\], must be \[B, H, T, V\] with q's sizes"),
    "two dtypes": ((Q, K.half(), V), r"k is torch.float16, must be q's dtype torch.float32"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_argument(reason: str) -> None:
    arguments, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        causal_linear_decoder(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", range(4))
def test_what_is_no_tensor(position: int) -> None:
    arguments: list[object] = [Q, K, V, True, GAMMA]
    arguments[position if position < 3 else 4] = [1.0, 2.0, 3.0]
    with pytest.raises(TypeError, match=rf"^{('q', 'k', 'v', 'gamma')[position]} is a list, must be a torch.Tensor"):
        causal_linear_decoder(*arguments)  # type: ignore[arg-type]


def test_triton_names_without_triton_are_their_torch_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    q, k, v = inputs(1, 2, 40, 8, value_dim=8)
    assert available_methods("cpu")["triton"] is not None
    for name in ("lightningAttention2", "FleetAttention", "causal_dot_product"):
        found, wanted = (causal_linear_decoder(q, k, v, attn_method=n) for n in (name, name + "_torch"))
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_on_a_gpu(name: str | None, dtype: torch.dtype) -> None:
    q, k, v = inputs(2, 6, 700, 64, value_dim=128, dtype=dtype, device="cuda")
    for kind in KINDS:
        arguments, decay = gamma_of(kind, 6)
        arguments = {a: x.cuda() if isinstance(x, Tensor) else x for a, x in arguments.items()}
        o = causal_linear_decoder(q, k, v, attn_method=name, **arguments)  # type: ignore[arg-type]
        assert error(o, oracle(q, k, v, decay.cuda())) <= TOLERANCE[dtype], kind


@pytest.fixture
def leetdecoding(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """LeetDecoding's module where it is installed, with stand-ins for what needs a GPU to be imported at all."""
    pytest.importorskip("leetDecoding", reason="pip install --no-deps leetDecoding==0.0.3")
    stand_ins = ("pycuda", "pycuda.driver", "pycuda.autoinit", "pynvml", "leetDecoding.methods.causal_dot_product")
    for name in stand_ins:
        module = types.ModuleType(name)
        module.causal_dot_product = None  # type: ignore[attr-defined]
        module.Device = lambda _: types.SimpleNamespace(name=lambda: "NVIDIA RTX A6000")  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    import leetDecoding.efficient_linear_decoding as theirs

    return theirs


def test_against_leetdecoding(leetdecoding: types.ModuleType) -> None:
    """The signature, and the results of those of its methods that can run on a CPU.

    Two of its methods take the decay itself where the others take its rate, and its FleetAttention takes logarithms of
    k * v, which must be positive for it.
    """
    theirs = inspect.signature(leetdecoding.causal_linear_decoder)
    mine = inspect.signature(causal_linear_decoder)
    assert [(p.name, p.default, p.kind) for p in theirs.parameters.values()] == [
        (p.name, p.default, p.kind) for p in mine.parameters.values()
    ]
    assert set(leetdecoding.ATTENTION_MAP) == set(NAMES)
    q, k, v = (x.abs() for x in inputs(2, 3, 150, 8, value_dim=12))
    rate = torch.tensor([0.05, 0.2, 0.5])
    for name in ("vanilla", "lightningAttention2_torch", "recursion", "block-based"):
        found = causal_linear_decoder(q, k, v, True, rate, True, name)
        torch.testing.assert_close(found, leetdecoding.ATTENTION_MAP[name](q, k, v, rate), rtol=1e-4, atol=1e-4)
    for name in ("causal_dot_product_torch", "FleetAttention_torch"):
        factor = (-rate).exp()
        found = causal_linear_decoder(q, k, v, True, factor, False, name)
        torch.testing.assert_close(found, leetdecoding.ATTENTION_MAP[name](q, k, v, factor), rtol=1e-4, atol=1e-4)
    for name in ("vanilla", "lightningAttention2_torch", "causal_dot_product_torch", "FleetAttention_torch"):
        found = causal_linear_decoder(q, k, v, attn_method=name)
        torch.testing.assert_close(found, leetdecoding.ATTENTION_MAP[name](q, k, v), rtol=1e-4, atol=1e-4)
