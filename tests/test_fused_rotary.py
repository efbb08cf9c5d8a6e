"""The kernel that turns q and k, against its formula in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fused_cases import DEVICE, close, poisoned, strided, with_gradients
from leet_hf.fused.rotary import KINDS, turned

pytest.importorskip("triton")


def tables(batch: int, tokens: int, columns: int, same_halves: bool = False) -> tuple[Tensor, Tensor]:
    """cos and sin of any angles: a table of R columns need not repeat itself."""
    angles = torch.randn(batch, tokens, 1, columns, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    if same_halves:
        angles = angles[..., : columns // 2].repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "layout", "channels", "rows", "dtype"),
    [
        ((2, 3, 4, 2, 16), "contiguous", 16, 1, torch.bfloat16),
        ((2, 5, 3, 1, 24), "packed", 24, 2, torch.float32),  # heads and pairs that are no powers of two
        ((1, 1, 8, 8, 20), "odd", 20, 1, torch.float16),
        ((2, 3, 2, 4, 26), "heads first", 12, 2, torch.bfloat16),  # a part is turned
        ((1, 2, 5, 20, 4), "contiguous", 2, 1, torch.float32),
    ],
    ids=str,
)
def test_against_the_formula(
    shape: tuple[int, ...], layout: str, channels: int, rows: int, dtype: torch.dtype, kind: str
) -> None:
    batch, tokens, heads_q, heads_k, dim = shape
    q, k, dq, dk = (
        strided((batch, tokens, heads, dim), dtype, layout, seed)
        for seed, heads in enumerate((heads_q, heads_k, heads_q, heads_k))
    )
    cos, sin = tables(rows, tokens, channels if kind == "rope_twice" else channels // 2)
    with poisoned():
        found = with_gradients(partial(turned, cos=cos, sin=sin, kind=kind, method="triton"), (q, k), (dq, dk))
    assert all(x.is_contiguous() for x in found)
    close(found, lambda q, k: turned(q, k, cos.double(), sin.double(), kind, method="torch"), (q, k), (dq, dk))


def test_tables_of_narrow_dtype() -> None:
    q, k = (strided((2, 3, 2, 8), torch.bfloat16, "contiguous", seed) for seed in (0, 1))
    cos, sin = (x.bfloat16() for x in tables(1, 3, 8))
    found = turned(q, k, cos, sin, "rope_twice", method="triton")
    wanted = turned(q.float(), k.float(), cos.float(), sin.float(), "rope_twice", method="torch")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2**-7, atol=2**-7)


def test_tables_may_be_broadcast_and_strided() -> None:
    q, k = (strided((2, 3, 2, 8), torch.float32, "contiguous", seed) for seed in (0, 1))
    cos, sin = (x[:, :, :, :4].expand(2, -1, -1, -1) for x in tables(1, 3, 9))
    assert cos.stride(0) == 0 and cos.stride(1) == 9
    found = turned(q, k, cos, sin, method="triton")
    for a, b in zip(found, turned(q, k, cos, sin, method="torch"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [0, 2])
def test_turned_back(tokens: int) -> None:
    """The gradient is the rotation by the opposite angle."""
    q, k = (strided((1, tokens, 2, 8), torch.float32, "contiguous", seed) for seed in (0, 1))
    cos, sin = tables(1, tokens, 4)
    there = with_gradients(partial(turned, cos=cos, sin=sin, method="triton"), (q, k), (q, k))
    back = turned(q, k, cos, -sin, method="triton")
    for a, b in zip(there[2:], back, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_keys_get_no_gradient() -> None:
    q, k = (strided((1, 2, 2, 8), torch.float32, "contiguous", seed) for seed in (0, 1))
    cos, sin = tables(1, 2, 4)
    out, _ = turned(q.requires_grad_(), k, cos, sin, method="triton")
    out.sum().backward()
    assert q.grad is not None and k.grad is None


def test_no_second_derivative() -> None:
    q, k = (strided((1, 2, 2, 8), torch.float32, "contiguous", seed).requires_grad_() for seed in (0, 1))
    out, _ = turned(q, k, *tables(1, 2, 4), method="triton")
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tables_that_learn_get_gradients() -> None:
    q, k = (strided((1, 2, 2, 8), torch.float32, "contiguous", seed) for seed in (0, 1))
    cos, sin = (x.requires_grad_() for x in tables(1, 2, 4))
    sum(x.sum() for x in turned(q, k, cos, sin, method="triton")).backward()  # type: ignore[union-attr]
    assert cos.grad is not None and sin.grad is not None


def test_transforms_take_the_formula() -> None:
    q, k = (strided((3, 1, 2, 2, 8), torch.float32, "contiguous", seed) for seed in (0, 1))
    cos, sin = tables(1, 2, 4)
    found = torch.vmap(lambda q, k: turned(q, k, cos, sin, method="triton"))(q, k)
    for x, out in zip((q, k), found, strict=True):
        torch.testing.assert_close(out, torch.stack([turned(y, y, cos, sin, method="torch")[0] for y in x]))


def test_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(turned, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for tokens in (3, 5, 7):
        inputs = tuple(strided((2, tokens, 2, 8), torch.float32, "packed", seed) for seed in (0, 1))
        cos, sin = tables(1, tokens, 4)
        results = [
            with_gradients(partial(f, cos=cos, sin=sin, method=method), inputs, inputs)
            for f, method in ((compiled, "triton"), (turned, "torch"))
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operator() -> None:
    q, k = (strided((2, 3, 2, 8), torch.float32, "contiguous", seed).requires_grad_() for seed in (0, 1))
    torch.library.opcheck(torch.ops.leet_hf.rotary.default, (q, k, *tables(1, 3, 4), "rope", False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "xpos"}, "kind is 'xpos', must be one of"),
        ({"k": torch.zeros(2, 3, 2, 6)}, "q and k have shapes"),
        ({"cos": torch.zeros(1, 4, 1, 4)}, "cos and sin have shapes"),
        ({"cos": torch.zeros(1, 3, 1, 5), "sin": torch.zeros(1, 3, 1, 5)}, "cos and sin have shapes"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    x, table = torch.zeros(2, 3, 2, 8), torch.zeros(1, 3, 1, 4)
    with pytest.raises(ValueError, match=message):
        turned(**{"q": x, "k": x, "cos": table, "sin": table, "kind": "rope", "method": "triton"} | change)
