"""Every decoding mode of a patched model against cache-free forwards of the stock model, on three layouts."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Cache

import tiny
from combined_modes import COMBINED, decode_after_packing
from leet_hf import patch_model
from leet_hf.modes import Answer, Expected, Mode, Outcome, Row, Truth, check, modes
from leet_hf.modes.assisting import softmax_model
from leet_hf.modes.base import compare
from leet_hf.modes.helpers import joined
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_of

MODES = {mode.name: mode for mode in modes()}
SHORT = {mode.name: mode for mode in modes(long=256)}
FLOAT32 = [name for name in MODES if name != "bf16-decoding"]

# All that stock gets right with a linear layer first, as published. A failure here may mean that stock was mended.
STOCK_RIGHT = {"greedy", "sampling", "num-return-sequences", "inputs-embeds", "recorded-outputs", "lora", "device-map"}


@functools.cache
def truth_of(layout: str, **changes: int) -> Truth:
    return Truth(tiny.model(layout, **changes), tiny.prompts())


@functools.cache
def patched_of(layout: str, **changes: int) -> Any:
    return patch_model(tiny.model(layout, **changes))


def must_agree(mode: Mode, model: Any, truth: Truth, **options: Any) -> None:
    if (lacking := mode.missing()) is not None:
        pytest.skip(lacking)
    outcome = check(mode, model, truth=truth, **options)
    assert outcome.agrees, outcome.reason


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("name", SHORT)
def test_patched_agrees_with_cache_free_stock(name: str, layout: str) -> None:
    must_agree(SHORT[name], patched_of(layout), truth_of(layout))


def test_bfloat16_state_after_2048_tokens() -> None:
    """Against float64 on the inputs of the bfloat16 model itself."""
    must_agree(MODES["bf16-decoding"], patched_of("linear-first"), truth_of("linear-first"))


@torch.no_grad()
def test_bfloat16_state_after_2048_tokens_is_that_of_the_float32_model() -> None:
    """Against stock in float32 with the same weights, whose forward gives the final state as the layer's attention."""
    stock = tiny.rounded()
    tokens = joined(tiny.prompts((1000, 600, 448)))
    cache, patched = None, patch_model(copy.deepcopy(stock).bfloat16())
    for token in tokens:
        cache = cache_of(patched(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True))
    stock.set_attn_implementation("eager")  # sdpa would return no attentions
    states = stock(input_ids=torch.tensor([tokens]), use_cache=False, output_attentions=True).attentions
    for layer in range(3):
        assert relative_error(cache.layers[layer].recurrent_states[0], states[layer]) <= 0.01


@pytest.mark.parametrize("name", SHORT)
def test_stock_with_a_linear_layer_first_is_right_and_wrong_where_known(name: str) -> None:
    if (lacking := SHORT[name].missing()) is not None:
        pytest.skip(lacking)
    outcome = check(SHORT[name], tiny.model("linear-first"), truth=truth_of("linear-first"))
    assert outcome.agrees == (name in STOCK_RIGHT), outcome


@pytest.mark.parametrize("name", FLOAT32)
def test_head_dim_that_is_no_power_of_two(name: str) -> None:
    must_agree(MODES[name], patched_of("linear-first", head_dim=24), truth_of("linear-first", head_dim=24))


@pytest.mark.parametrize("name", [name for name in FLOAT32 if name not in ("lora", "device-map", "recorded-outputs")])
def test_bfloat16_stays_near_float32(name: str) -> None:
    stock = tiny.rounded()
    patched = patch_model(copy.deepcopy(stock).bfloat16())
    must_agree(MODES[name], patched, Truth(stock, tiny.prompts()), exact=False, tolerance=0.05)


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_tiny_models_are_worth_asking(layout: str) -> None:
    """Greedy outputs vary and no choice is close, so that equal tokens mean something."""
    truth = truth_of(layout)
    for prompt in truth.prompts:
        tokens = truth.greedy(prompt, 24)
        assert len(set(tokens[len(prompt) :])) >= 10
        best, second = truth.logits(tokens)[len(prompt) - 1 :].topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-3


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("mode", COMBINED, ids=lambda mode: mode.name)
def test_modes_combined(mode: Mode, layout: str) -> None:
    must_agree(mode, patched_of(layout), truth_of(layout))


CONTROL = [mode for mode in [*SHORT.values(), *COMBINED] if not mode.name.startswith(("packed", "bf16"))]


@pytest.mark.parametrize("mode", CONTROL, ids=lambda mode: mode.name)
def test_a_softmax_model_is_right_without_patching(mode: Mode) -> None:
    """The modes ask nothing that transformers can not do with softmax models; packing with a cache it can not."""
    llama = softmax_model(tiny.model())
    must_agree(mode, llama, Truth(llama, tiny.prompts()))


def test_state_after_packing_is_that_of_the_last_sequence() -> None:
    mode = Mode("decode-after-packing", "", decode_after_packing)
    must_agree(mode, patched_of("all-linear"), truth_of("all-linear"))


def test_assisted_decoding_takes_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is sometimes right, sometimes wrong: rollbacks of several lengths, and none, did happen."""
    crops: list[int] = []
    crop = Cache.crop
    monkeypatch.setattr(Cache, "crop", lambda cache, tokens: (crops.append(tokens), crop(cache, tokens))[1])
    must_agree(MODES["assisted-recurrent-draft"], patched_of("linear-first"), truth_of("linear-first"))
    assert 0 in crops
    assert len({tokens for tokens in crops if tokens < 0}) >= 3


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"], ids=str)
def test_loaded_with_device_map_then_patched(device_map: Any, tmp_path: Any) -> None:
    truth = truth_of("linear-first")
    truth.model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, dtype=torch.float32)
    must_agree(MODES["left-padding"], patch_model(model), truth)


def test_dispatched_then_patched(tmp_path: Any) -> None:
    """Hooks that were there before patching keep moving weights in and out."""
    from accelerate import dispatch_model

    truth = truth_of("linear-first")
    base = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map = base | {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    model = dispatch_model(tiny.model("linear-first"), device_map, main_device="cpu", offload_dir=tmp_path)
    must_agree(MODES["left-padding"], patch_model(model), truth)


# The comparison itself must be able to say no.


def _outcome(rows: list[Row], expected: Expected, truth: Truth, *, exact: bool = True) -> Outcome:
    return compare(Answer(rows), expected, truth, limit=1e-4, exact=exact)


def test_compare_finds_wrong_tokens_logits_rows_and_values() -> None:
    truth = truth_of("linear-first")
    tokens = truth.greedy(truth.prompts[0], 4)
    right = Row(tokens, 3, truth.logits(tokens)[3:9])
    assert _outcome([right], Expected([tokens]), truth) == Outcome(True, 0.0)

    other = [*tokens[:-1], tokens[-1] ^ 1]
    wrong_tokens = _outcome([right], Expected([other]), truth)
    assert not wrong_tokens.agrees and f"position {len(tokens) - 1}" in wrong_tokens.reason
    assert _outcome([right], Expected([other]), truth, exact=False).agrees
    assert not _outcome([right, right], Expected([tokens]), truth).agrees
    assert not _outcome([Row(tokens, 4, right.logits)], Expected(), truth).agrees
    assert not _outcome([Row(tokens, 3, right.logits * 1.001)], Expected(), truth).agrees

    lost = right.logits.clone()
    lost[2, 5] = math.nan
    assert not _outcome([Row(tokens, 3, lost)], Expected(), truth).agrees
    shown = compare(
        Answer(values={"a": torch.ones(3), "b": torch.ones(2)}),
        Expected(values={"a": torch.ones(3), "b": torch.ones(3)}),
        truth, limit=1e-4, exact=True,
    )  # fmt: skip
    assert shown == Outcome(False, math.inf, "b: relative error inf, at most 0.0001 is right")


def test_check_reports_an_exception_as_an_outcome() -> None:
    def run(model: Any, prompts: list[list[int]]) -> Answer:
        raise IndexError("no such row")

    outcome = check(Mode("broken", "", run), truth_of("linear-first").model, truth=truth_of("linear-first"))
    assert outcome == Outcome(False, math.inf, "IndexError: no such row")


@pytest.mark.parametrize("lengths", [(8, 9), (8, 8, 8), (3, 9, 10)], ids=str)
def test_truth_refuses_prompts_that_show_nothing(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prompts has rows of"):
        Truth(tiny.model(), tiny.prompts(lengths))


def test_mode_names_are_unique_and_titled() -> None:
    assert len(MODES) == len(modes()) == 34
    assert all(mode.title for mode in modes())
