"""Hosts with lightning attention and DecayLinearAttention on a GPU: modes in float32, bfloat16, compiled whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import host_checks
import test_adapter_hypenet
import test_adapter_minimax_text_01
import test_adapter_sala
import test_module
import tiny
from leet_hf import patch_model
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error

pytestmark = pytest.mark.gpu
HOSTS: dict[str, Any] = {
    "sala": test_adapter_sala.stock,
    "hypenet": test_adapter_hypenet.stock,
    "minimax_text_01": test_adapter_minimax_text_01.stock,
}
MODES = [name for name in host_checks.MODES if name not in ("recorded-outputs", "inputs-embeds")]


@functools.cache
def truth_of(host: str) -> Truth:
    return Truth(HOSTS[host]().cuda(), tiny.prompts())


@functools.cache
def patched_of(host: str) -> Any:
    return patch_model(HOSTS[host]().cuda())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", MODES)
def test_modes(name: str, host: str) -> None:
    host_checks.must_agree(name, patched_of(host), truth_of(host))


@pytest.mark.parametrize("kind", test_module.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_linear_attention(dtype: torch.dtype, kind: str) -> None:
    module, x = test_module.made(kind, dtype).eval(), test_module.inputs(2, 200, dtype)
    want = test_module.truth_of(module, x)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    module, x, cache = module.cuda(), x.cuda(), DynamicCache()
    assert relative_error(module(x)[0], want) <= limit
    with torch.no_grad():
        parts = [module(part, past_key_values=cache)[0] for part in x.split([150, *[1] * 50], dim=1)]
    assert relative_error(torch.cat(parts, 1), want) <= limit


@pytest.mark.parametrize("kind", ["retnet", "learned"])
def test_decay_linear_attention_compiled_by_inductor(kind: str) -> None:
    module, x = test_module.made(kind).cuda(), test_module.inputs(2, 200).cuda()
    got = torch.autograd.grad(torch.compile(module, fullgraph=True)(x)[0].square().sum(), list(module.parameters()))
    want = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-4
