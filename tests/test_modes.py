"""Every decoding mode of a patched model against cache-free forwards of the stock model, on three layouts."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, Cache

import tiny
from leet_hf import patch_model
from leet_hf.modes import Answer, Expected, Mode, Outcome, Row, Truth, check, modes
from leet_hf.modes.assisting import DRAFTING, softmax_model
from leet_hf.modes.base import compare
from leet_hf.modes.batching import pack
from leet_hf.modes.continuing import static_cache
from leet_hf.modes.helpers import decode, generate, joined, perturbed
from leet_hf.modes.truth import relative_error

CHUNKS_FROM_A_CACHE = Version(transformers.__version__) >= Version("5.21")
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
        cache = patched(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
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


# Uses of several features at once, where each alone is a mode.


def _expect_greedy(truth: Truth, new: int) -> Expected:
    return Expected([truth.greedy(prompt, new) for prompt in truth.prompts])


def _long(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(generate(model, prompts, 100)[0])


def _static_batch(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(generate(model, prompts, 24, cache_implementation="static")[0])


def _static_middle(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(decode(model, prompts, 24, side="middle", cache=static_cache(model, prompts, 24)))


def _one_token_prompt(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer([generate(model, [prompt[:1]], 24)[0][0] for prompt in prompts])


def _expect_from_one_token(truth: Truth) -> Expected:
    return Expected([truth.greedy(prompt[:1], 24) for prompt in truth.prompts])


def _beams_of_a_batch(model: Any, prompts: list[list[int]]) -> Answer:
    return Answer(generate(model, prompts, 24, num_beams=3)[0])


def _expect_beams(truth: Truth) -> Expected:
    rows = [generate(truth.model, [p], 24, num_beams=3, use_cache=False)[0][0].tokens for p in truth.prompts]
    return Expected(rows)


def _second_turn(model: Any, prompts: list[list[int]], **options: Any) -> Answer:
    """A batch of conversations with pads inside: the second turns have different lengths too."""
    rows, output = generate(model, prompts, 12)
    ids, width = output.sequences, max(map(len, prompts))
    turns = list(reversed(prompts))
    mask = torch.stack([torch.tensor([0] * (width - len(p)) + [1] * (len(p) + 12)) for p in prompts])
    pads = torch.stack([torch.tensor([0] * (width - len(turn)) + [1] * len(turn)) for turn in turns])
    new = torch.stack([torch.tensor([0] * (width - len(turn)) + turn) for turn in turns])
    inputs = {"input_ids": torch.cat([ids, new], 1), "attention_mask": torch.cat([mask, pads], 1)}
    inputs["past_key_values"] = output.past_key_values
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    logits = torch.stack(output.logits, 1)
    return Answer([
        Row(row.tokens + turn + output.sequences[i, -12:].tolist(), len(row.tokens + turn) - 1, logits[i])
        for i, (row, turn) in enumerate(zip(rows, turns, strict=True))
    ])  # fmt: skip


def _expect_second_turn(truth: Truth) -> Expected:
    turns = zip(truth.prompts, reversed(truth.prompts), strict=True)
    return Expected([truth.greedy(truth.greedy(prompt, 12) + turn, 12) for prompt, turn in turns])


def _after_assisted(model: Any, prompts: list[list[int]]) -> Answer:
    """Plain decoding goes on with the cache of assisted decoding. (The other way round transformers gets wrong itself:
    assisted decoding feeds a cache the tokens it already holds, softmax models too.)"""
    draft = perturbed(model)
    draft.generation_config.update(**DRAFTING)
    (row,), output = generate(model, prompts[:1], 12, assistant_model=draft)
    for turn in prompts[1:]:
        (row,), output = generate(model, [row.tokens + turn], 12, past_key_values=output.past_key_values)
    return Answer([row])


def _expect_turns(truth: Truth) -> Expected:
    tokens: list[int] = []
    for prompt in truth.prompts:
        tokens = truth.greedy(tokens + prompt, 12)
    return Expected([tokens])


def _packed_by_index(model: Any, prompts: list[list[int]]) -> Answer:
    parts = pack(prompts, model.device)
    logits = model(**parts["ids"], **parts["positions"], **parts["index"]).logits[0].detach()
    return Answer([Row(row, 0, own) for row, own in zip(prompts, logits.split([*map(len, prompts)]), strict=True)])


def _decode_after_packing(model: Any, prompts: list[list[int]]) -> Answer:
    """The cache of a packed forward goes on with its last sequence; no softmax layer here remembers the others."""
    parts = pack(prompts, model.device)
    with torch.inference_mode():
        output = model(**parts["ids"], **parts["lengths"], **parts["positions"], use_cache=True)
        tokens, logits = list(prompts[-1]), [output.logits[0, -len(prompts[-1]) :]]
        for _ in range(20):
            tokens.append(int(logits[-1][-1].argmax()))
            step = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[len(tokens) - 1]])}
            output = model(**step, past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0])
    return Answer([Row(tokens, 0, torch.cat(logits).float())])


COMBINED = [
    Mode("long-batch", "", _long, lambda truth: _expect_greedy(truth, 100)),
    Mode("static-left-padding", "", _static_batch, lambda truth: _expect_greedy(truth, 24)),
    Mode("static-middle-padding", "", _static_middle, lambda truth: _expect_greedy(truth, 24)),
    Mode("one-token-prompt", "", _one_token_prompt, _expect_from_one_token),
    Mode("beams-left-padding", "", _beams_of_a_batch, _expect_beams),
    Mode("chat-padded-batch", "", _second_turn, _expect_second_turn),
    Mode(
        "chat-padded-batch-in-chunks", "", functools.partial(_second_turn, prefill_chunk_size=7), _expect_second_turn,
        missing=lambda: None if CHUNKS_FROM_A_CACHE else "transformers chunks from a cache since 5.21",
    ),
    Mode("chat-after-assisted", "", _after_assisted, _expect_turns),
    Mode("packed-by-seq-idx", "", _packed_by_index),
]  # fmt: skip


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
    mode = Mode("decode-after-packing", "", _decode_after_packing)
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
