"""The decoding modes and training modes on a GPU: float32 by tokens and logits, bfloat16 by logits."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import tiny
from leet_hf import patch_model
from leet_hf.modes import Answer, Expected, Mode, Truth, check, modes
from leet_hf.modes.helpers import generate
from test_training_modes import assert_same, gradients, in_batch, packed, separate

pytestmark = pytest.mark.gpu
MODES = {mode.name: mode for mode in modes()}
# These make a float32 comparison of their own, or add weights that a float32 truth would not round.
NOT_IN_BFLOAT16 = {"recorded-outputs", "lora", "bf16-decoding"}


@functools.cache
def truth_of(layout: str, *, rounded: bool) -> Truth:
    return Truth((tiny.rounded(layout) if rounded else tiny.model(layout)).cuda(), tiny.prompts())


@functools.cache
def patched_of(layout: str, dtype: torch.dtype) -> Any:
    truth = truth_of(layout, rounded=dtype != torch.float32)
    return patch_model(copy.deepcopy(truth.model).to(dtype))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("name", MODES)
def test_float32_agrees_with_cache_free_stock(name: str, layout: str) -> None:
    if (lacking := MODES[name].missing()) is not None:
        pytest.skip(lacking)
    outcome = check(MODES[name], patched_of(layout, torch.float32), truth=truth_of(layout, rounded=False))
    assert outcome.agrees, outcome.reason


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("name", [name for name in MODES if name not in NOT_IN_BFLOAT16])
def test_bfloat16_stays_near_float32(name: str, layout: str) -> None:
    if (lacking := MODES[name].missing()) is not None:
        pytest.skip(lacking)
    truth = truth_of(layout, rounded=True)
    outcome = check(MODES[name], patched_of(layout, torch.bfloat16), truth=truth, exact=False, tolerance=0.05)
    assert outcome.agrees, outcome.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_compiled_as_it_chooses_itself(dtype: torch.dtype) -> None:
    """A static cache on a GPU makes generate() compile its decode step into CUDA graphs. Two batches replay them."""

    def run(model: Any, prompts: list[list[int]]) -> Answer:
        batches = [prompts, prompts[::-1]]
        return Answer([row for rows in batches for row in generate(model, rows, 24, cache_implementation="static")[0]])

    def expect(truth: Truth) -> Expected:
        rows = [truth.greedy(prompt, 24) for prompt in truth.prompts]
        return Expected(rows + rows[::-1])

    exact = dtype == torch.float32
    truth, model = truth_of("linear-first", rounded=not exact), patched_of("linear-first", dtype)
    outcome = check(Mode("", "", run, expect), model, truth=truth, exact=exact, tolerance=1e-4 if exact else 0.05)
    assert outcome.agrees, outcome.reason
    assert hasattr(model, "_compiled_call"), "generate() did not compile"


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("loss", [separate, in_batch, packed], ids=lambda loss: loss.__name__)
def test_gradients_are_those_of_separate_rows_in_stock(loss: Any, layout: str) -> None:
    want = gradients(tiny.model(layout).cuda().train(), separate)
    assert_same(gradients(patch_model(tiny.model(layout).cuda().train()), loss), want)
