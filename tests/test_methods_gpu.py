"""The named algorithms on a GPU: the shapes their Triton forms are made for, CUDA graphs, long offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leet_linear_attention import linear_attention, methods
from operator_cases import TOLERANCE, Case, assert_close, error, errors, make_inputs, run_oracle

pytestmark = pytest.mark.gpu
ON_TRITON = [name for name in methods.NAMES if name.endswith("_triton")]
IN_TORCH = [name for name in methods.NAMES if name not in ON_TRITON]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("name", ON_TRITON)
def test_triton_forms_at_real_shapes(name: str, decay: str, dtype: torch.dtype) -> None:
    for more in (
        {"tokens": 2048, "key_dim": 128, "value_dim": 128, "heads": (8, 8, 8, 8)},
        {"tokens": 1000, "key_dim": 256, "value_dim": 512, "heads": (4, 2, 4, 4)},
        {"tokens": 777, "key_dim": 512, "value_dim": 100, "heads": (2, 2, 2, 1)},
        {"tokens": 3001, "key_dim": 96, "value_dim": 64, "heads": (4, 4, 4, 4), "packed": True},
    ):
        x = make_inputs(Case(**more, decay=decay, dtype=dtype), "cuda")
        found = errors(x, name, run_oracle(x))
        assert max(found.values()) <= TOLERANCE[dtype], (more, found)


@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_forms_on_a_gpu(name: str) -> None:
    for case in (Case(tokens=300, decay="head", dtype=BF16), Case(tokens=257, packed=True)):
        x = make_inputs(case, "cuda")
        assert_close(x, name, run_oracle(x))


@pytest.mark.parametrize("name", ON_TRITON)
def test_triton_forms_in_a_graph_without_waiting(name: str) -> None:
    x = make_inputs(Case(tokens=300, key_dim=64, value_dim=64, decay="head", dtype=BF16, packed=True), "cuda")

    def forward() -> tuple[Tensor, Tensor | None]:
        return linear_attention(
            x.q, x.k, x.v, x.log_decay, cu_seqlens=x.cu_seqlens, output_final_state=True, method=name
        )

    forward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, state = forward()
    x.v.normal_()
    graph.replay()
    wanted, wanted_state = forward()
    assert state is not None and wanted_state is not None
    assert torch.equal(o, wanted) and torch.equal(state, wanted_state)


def test_offsets_beyond_2_to_the_31() -> None:
    tokens, heads, width = 140_000, 128, 128  # 2.3e9 elements a tensor
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    q, k, v = (torch.empty(1, tokens, heads, width, device="cuda", dtype=BF16).normal_() for _ in range(3))
    g = -torch.rand(heads, device="cuda") * 0.1 - 0.01
    tail = slice(tokens - 4000, tokens)  # what came before has decayed away: exp(-0.01 * 4000)
    wanted, _ = linear_attention(q[:, tail], k[:, tail], v[:, tail], g)
    for name in ON_TRITON:
        o, _ = linear_attention(q, k, v, g, method=name)
        assert error(o[:, -1000:], wanted[:, -1000:]) <= TOLERANCE[BF16], name
        del o
