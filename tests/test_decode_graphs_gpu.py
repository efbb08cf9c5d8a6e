"""Decode graphs on a GPU: tokens with and without them, reuse, batch sizes, padding, refusals, memory, threads."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

import tiny
import tiny_retnet
from leet_hf import load_cache, patch_model, patch_report, rounds, save_cache
from leet_hf.decoding import MOST_BYTES
from leet_hf.experts import experts_set_to
from leet_hf.modes import Truth, check, modes
from leet_hf.modes.helpers import perturbed
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_of
from test_decode_graphs_ahead import StopAfter
from test_decode_graphs_rounds import asked_for
from test_streaming import Words

pytestmark = pytest.mark.gpu
MODES = {mode.name: mode for mode in modes()}
RECORDED = [
    "greedy", "sampling", "num-return-sequences", "beam", "beam-sample", "left-padding", "chunked-prefill",
    "inputs-embeds", "chat", "dynamic-cache-given", "reset", "assisted-recurrent-draft", "assisted-softmax-draft",
    "assisted-as-draft", "prompt-lookup", "early-exit",
]  # fmt: skip
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
DRAFTED = ("prompt_lookup_num_tokens", "assistant_model")  # what changes how a text is written, not which
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


def ids(rows: int = 1, tokens: int = 11, seed: int = 5) -> torch.Tensor:
    return torch.tensor(tiny.prompts((tokens,) * rows, seed)).cuda()


@functools.cache
def truth_of(layout: str) -> Truth:
    return Truth(tiny.model(layout).cuda(), tiny.prompts())


def plain(model: Any) -> Any:
    """The same weights, without graphs."""
    return patch_model(copy.deepcopy(model), decode_graphs=False)


def recordings(model: Any) -> list[Any]:
    steps = [step for arena in model._leet.decoding.arenas.values() for step in arena.recordings.values()]
    assert not any(step.troubles for step in steps), [step.troubles for step in steps]
    return [step.recorded for step in steps if step.recorded is not None]


def reason(model: Any) -> str:
    return next(line for line in patch_report(model).host if line.startswith("decode graphs"))


def same_tokens(model: Any, prompt: torch.Tensor, **options: Any) -> None:
    options = OPTIONS | options
    got = model.generate(prompt, **options)
    for name in DRAFTED:
        options.pop(name, None)
    assert torch.equal(got, plain(model).generate(prompt, **options))


@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("name", RECORDED)
def test_modes_in_float32(name: str, layout: str) -> None:
    model = patch_model(copy.deepcopy(truth_of(layout).model))
    outcome = check(MODES[name], model, truth=truth_of(layout))
    assert outcome.agrees, outcome.reason
    # The modes of drafts copy the model; the others must have recorded with this one.
    if name not in ("assisted-recurrent-draft", "early-exit"):
        assert recordings(model), reason(model)


@pytest.mark.parametrize("name", ["left-padding", "beam", "prompt-lookup", "chat"])
def test_modes_in_bfloat16(name: str) -> None:
    truth = Truth(tiny.rounded().cuda(), tiny.prompts())
    model = patch_model(copy.deepcopy(truth.model).bfloat16())
    outcome = check(MODES[name], model, truth=truth, exact=False, tolerance=0.05)
    assert outcome.agrees, outcome.reason
    assert recordings(model), reason(model)


@pytest.mark.parametrize("kind", list(tiny_retnet.KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_retnet(kind: str, dtype: torch.dtype) -> None:
    model = tiny_retnet.model(kind).to(device="cuda", dtype=dtype)
    for rows in (1, 3):
        prompt = ids(rows)
        if dtype == torch.float32:
            same_tokens(model, prompt)
        else:
            _near_float32(model, prompt)
    assert len(recordings(model)) == 2, reason(model)


def _near_float32(model: Any, prompt: torch.Tensor) -> None:
    """As near to the float32 model on the same tokens as bfloat16 is token by token, without graphs.

    The two sum in other orders, so their logits differ. The same implementation of experts is used by both.
    """
    output = model.generate(prompt, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    stepwise, cache, logits = plain(model), None, []
    steps = [step for arena in model._leet.decoding.arenas.values() for step in arena.recordings.values()]
    (implementation,) = {step.experts for step in steps}
    with torch.no_grad():
        for token in [prompt, *output.sequences[:, prompt.shape[1] : -1].split(1, dim=1)]:
            with experts_set_to(stepwise.base_model, implementation if cache is not None else None):
                out = stepwise(token, **{CACHE: cache}, use_cache=True)
            cache = cache_of(out)
            logits.append(out.logits[:, -1])
        exact = stepwise.float()(output.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    recorded, usual = (relative_error(torch.stack([*given], dim=1).float(), exact) for given in (output.logits, logits))
    assert recorded <= 1.5 * usual + 0.01 and usual < 0.3, (recorded, usual)


@pytest.mark.parametrize("rows", [1, 2, 8, 64])
@pytest.mark.parametrize("how", ["leet_hf", "grouped_mm", "batched_mm"])
def test_experts_of_a_step(how: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens in two launches; else bfloat16 on capability 9 groups tokens by expert; copies of weights last."""
    if how != "leet_hf":
        monkeypatch.setattr("leet_hf.fused.experts.MOST_TOKENS", 0)
    if how == "batched_mm":
        monkeypatch.setattr("leet_hf.experts.grouped_in_one_call", lambda weight: False)
    elif how == "grouped_mm" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("grouped_mm waits for the device before capability 9")
    # All experts are used: choosing makes rounding jump.
    half = patch_model(tiny.model(**SIZES, num_experts_per_tok=4).cuda().bfloat16())
    _near_float32(half, ids(rows))
    step = next(step for arena in half._leet.decoding.arenas.values() for step in arena.recordings.values())
    assert step.recorded is not None, reason(half)
    assert step.experts == how
    assert half.config._experts_implementation == "grouped_mm"
    if how != "grouped_mm":
        same_tokens(patch_model(tiny.model(**SIZES).cuda()), ids(rows))


def test_reuse_batch_sizes_growth_and_memory() -> None:
    model = patch_model(tiny.model().cuda())
    for rows in (1, 8, 1, 8, 64, 1):
        same_tokens(model, ids(rows, seed=rows))
    assert len(recordings(model)) == 3, "one a batch size"
    same_tokens(model, ids(1, 250))  # over the first 256 slots: a larger arena takes the place of the one of this batch
    assert len(recordings(model)) == 3
    same_tokens(model, ids(1))  # in the larger arena, looking at its first 256 slots
    assert len(recordings(model)) == 4
    assert model._leet.decoding.recorder.nbytes <= MOST_BYTES
    held = torch.cuda.memory_allocated()
    for _ in range(5):
        model.generate(ids(8), **OPTIONS)
    assert torch.cuda.memory_allocated() <= held + (1 << 20), "calls after the first leave nothing behind"


@pytest.mark.parametrize("kind", ["linear-first", "retnet"])
def test_steps_launched_ahead_leave_no_trace(kind: str) -> None:
    """The step under way when all rows have ended is taken back, wherever that is in the cycle of the buffer."""
    model = tiny_retnet.model("fla").cuda() if kind == "retnet" else patch_model(tiny.model().cuda())
    other, prompt = plain(model), ids(3)
    options = OPTIONS | {"max_new_tokens": 40, "return_dict_in_generate": True}
    for new in range(3, 22):
        stop = {"stopping_criteria": [StopAfter(prompt.shape[1] + new)]}
        got, want = (each.generate(prompt, **options, **stop) for each in (model, other))
        assert torch.equal(got.sequences, want.sequences) and cache_of(got).get_seq_length() == 11 + new - 1
        for ours, theirs in zip(cache_of(got).layers, cache_of(want).layers, strict=True):
            if hasattr(ours, "current_state"):
                torch.testing.assert_close(ours.current_state(), theirs.current_state(), rtol=1e-3, atol=1e-4)
        went_on = [
            each.generate(each_out.sequences, **OPTIONS, **{CACHE: cache_of(each_out)})
            for each, each_out in ((model, got), (other, want))
        ]
        assert torch.equal(*went_on)
    assert recordings(model), reason(model)


@pytest.mark.parametrize("draft", [False, True], ids=["lookup", "draft"])
@pytest.mark.parametrize("kind", ["linear-first", "all-linear", "retnet"])
def test_rounds_of_assisted_decoding(kind: str, draft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked_for(monkeypatch)
    monkeypatch.setattr(rounds, "LONGEST", 1e9)  # many tests at once: as many rounds as there is room for
    model = (tiny_retnet.model("fla") if kind == "retnet" else patch_model(tiny.model(kind))).cuda()
    prompt = ids(1, 7).repeat(1, 6)
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 7}
    if draft:
        how = {"assistant_model": perturbed(model)}
        how["assistant_model"].generation_config = GenerationConfig(
            num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
        )
    for new in (1, 9, 90, 200):
        same_tokens(model, prompt, max_new_tokens=new, **how)
    assert max(found) > 16 and recordings(model), reason(model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_device_than_the_current_one() -> None:
    model, prompt = patch_model(tiny.model().to("cuda:1")), ids(2).to("cuda:1")
    assert torch.cuda.current_device() == 0
    for _ in range(5):
        same_tokens(model, prompt)
    assert recordings(model), reason(model)


def test_padding_and_eager_attention() -> None:
    prompt, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.int64, device="cuda")
    mask[0, :5] = 0
    model = patch_model(tiny.model().cuda())
    same_tokens(model, prompt, attention_mask=mask)
    model.set_attn_implementation("eager")
    same_tokens(model, prompt, attention_mask=mask)
    assert recordings(model), reason(model)
    same_tokens(patch_model(tiny.model(sliding_window=8).cuda()), prompt, attention_mask=mask)


def test_a_returned_cache_is_kept_and_can_be_saved(tmp_path: Any) -> None:
    model = patch_model(tiny.model().cuda())
    options = OPTIONS | {"return_dict_in_generate": True}
    first = model.generate(ids(1), **options)
    path = save_cache(cache_of(first), tmp_path / "cache.safetensors", model)
    model.generate(ids(1, seed=9), **options)
    want = plain(model).generate(first.sequences, **OPTIONS)
    for cache in (cache_of(first), load_cache(path, model)):
        assert torch.equal(model.generate(first.sequences, **OPTIONS, **{CACHE: cache}), want)


def test_inference_mode_before_and_after() -> None:
    model = patch_model(tiny.model().cuda())
    with torch.inference_mode():
        first = model.generate(ids(2), **OPTIONS)
    second = model.generate(ids(2), **OPTIONS)
    with torch.inference_mode():
        third = model.generate(ids(2), **OPTIONS)
    want = plain(model).generate(ids(2), **OPTIONS)
    assert torch.equal(first, want) and torch.equal(second, want) and torch.equal(third, want)
    assert len(recordings(model)) == 1


@pytest.mark.parametrize("how", ["argument", "environment", "hook", "lora", "offloaded", "values"])
def test_refusals_say_why(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny.model().cuda())
    want = plain(model).generate(ids(1), **OPTIONS)
    if how == "argument":
        patch_model(model, decode_graphs=False)
    elif how == "environment":
        monkeypatch.setenv("LEET_DECODE_GRAPHS", "0")
    elif how == "hook":
        model.model.norm.register_forward_hook(lambda module, args, output: None)
    elif how == "lora":
        peft = pytest.importorskip("peft")
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    elif how == "offloaded":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=torch.device("cuda"))
    else:
        monkeypatch.setenv("LEET_CHECK_VALUES", "1")
    assert torch.equal(model.generate(ids(1), **OPTIONS), want)
    assert not recordings(model) and "decode graphs: not used: " in reason(model)


def test_streams_from_a_thread_and_two_models_at_once() -> None:
    models = [patch_model(tiny.model().cuda()), tiny_retnet.model().cuda()]
    want = [plain(model).generate(ids(1), **OPTIONS)[0, 11:].tolist() for model in models]
    for _ in range(3):
        streamers = [TextIteratorStreamer(Words(), skip_prompt=True, timeout=60) for _ in models]
        threads = [
            threading.Thread(target=model.generate, args=(ids(1),), kwargs=OPTIONS | {"streamer": streamer})
            for model, streamer in zip(models, streamers, strict=True)
        ]
        for thread in threads:
            thread.start()
        got = [[int(word) for word in "".join(streamer).split()] for streamer in streamers]
        for thread in threads:
            thread.join()
        assert got == want
    assert all(recordings(model) for model in models)


def test_one_model_in_two_threads() -> None:
    model = patch_model(tiny.model().cuda())
    model.generate(ids(1), **OPTIONS)
    prompts = [ids(1, seed=seed) for seed in range(4)]
    want = [plain(model).generate(prompt, **OPTIONS) for prompt in prompts]
    got: list[Any] = [None] * len(prompts)

    def work(place: int) -> None:
        got[place] = model.generate(prompts[place], **OPTIONS)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_million_tokens_in_constant_memory() -> None:
    model = patch_model(tiny.model("all-linear", num_hidden_layers=2, layer_types=[tiny.LINEAR] * 2).cuda())
    peaks = []
    for tokens in (1 << 14, 1_000_000):
        prompt = torch.randint(3, tiny.VOCAB, (1, tokens), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.generate(prompt, max_new_tokens=8, do_sample=False, prefill_chunk_size=4096)
        # The prompt, its positions and mask are as long as they are: 8 bytes each, a few times over.
        peaks.append(torch.cuda.max_memory_allocated() - before - 80 * tokens)
    assert peaks[1] <= max(peaks[0], 0) + (64 << 20), peaks
