"""Decode graphs on the CPU, with a recorder that replays as CUDA graphs do: every mode, reuse, growth, refusals.

What becomes of the caches of such calls: test_decode_graphs_caches.py.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

import tiny
import tiny_retnet
from fake_graphs import OPTIONS, FakeRecorder, ids, patched, replays, stock_tokens
from leet_hf import patch_model, patch_report, unpatch_model
from leet_hf.decoding import Decoding
from leet_hf.modes import check, modes
from leet_hf.versions import CACHE
from test_modes import truth_of

MODES = {mode.name: mode for mode in modes(new=18)}
# The modes whose forwards are those of generate() on a dynamic cache that it made or was given.
RECORDED = [
    "greedy", "beam-sample", "left-padding", "chunked-prefill", "chat", "dynamic-cache-given",
    "assisted-recurrent-draft", "assisted-as-draft", "prompt-lookup", "early-exit",
]  # fmt: skip
CASES = [(name, "linear-first") for name in RECORDED]
CASES += [("left-padding", "softmax-first"), ("prompt-lookup", "all-linear"), ("beam", "all-linear")]
pytestmark = pytest.mark.usefixtures("recorders")


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_modes_are_right(name: str, layout: str, recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model(layout))
    outcome = check(MODES[name], model, truth=truth_of(layout))
    assert outcome.agrees, outcome.reason
    assert replays(recorders) > (0 if name == "early-exit" and CACHE != "cache" else 10)  # fewer with transformers 5.17


@pytest.mark.parametrize("kind", ["fla", "torchscale", "hybrid"])
def test_our_own_models_need_no_patching(kind: str, recorders: list[FakeRecorder]) -> None:
    model = tiny_retnet.model(kind)
    got = model.generate(ids(2), **OPTIONS)
    assert replays(recorders) == 10
    assert torch.equal(got, stock_tokens(model, ids(2)))


def test_recordings_are_kept_per_batch_size_and_used_again(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    for rows in (1, 3, 1, 3, 1):
        prompt = ids(rows, seed=rows)
        assert torch.equal(model.generate(prompt, **OPTIONS), stock_tokens(model, prompt))
    assert len(recorders) == 1 and len(recorders[0].graphs) == 2
    # 11 steps a call; the first of a batch size runs as it is.
    assert [graph.replays for graph in recorders[0].graphs] == [32, 21]


def test_a_longer_sequence_is_recorded_again_only_where_the_window_doubles(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    prompt = ids(1, 245)
    assert torch.equal(
        model.generate(prompt, **OPTIONS | {"max_new_tokens": 30}), stock_tokens(model, prompt, max_new_tokens=30)
    )
    assert len(recorders[0].graphs) == 2  # up to 256 slots, and up to 512
    short = ids(1)
    assert torch.equal(model.generate(short, **OPTIONS), stock_tokens(model, short))
    arena = next(iter(model._leet.decoding.arenas.values()))
    assert arena.capacity == 512 and sorted(key[1] for key in arena.recordings) == [256, 512]

    recurrent = patched(tiny.model("all-linear"))
    recurrent.generate(prompt, **OPTIONS | {"max_new_tokens": 30})
    assert len(recorders[-1].graphs) == 1


def test_attention_with_additive_masks_and_sliding_windows(recorders: list[FakeRecorder]) -> None:
    prompt, mask = ids(2, 14), torch.ones(2, 14, dtype=torch.int64)
    mask[0, :5] = 0
    eager = patched(tiny.model())
    eager.set_attn_implementation("eager")
    sliding = patched(tiny.model(sliding_window=8))
    for model in (eager, sliding):
        got = model.generate(prompt, attention_mask=mask, **OPTIONS)
        assert torch.equal(got, stock_tokens(model, prompt, attention_mask=mask))
    assert replays(recorders) == 20


def test_weights_that_move_or_change_void_recordings(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    model.generate(ids(1), **OPTIONS)
    model.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.randn(4, 64, 64) / 8)
    assert torch.equal(model.generate(ids(1), **OPTIONS), stock_tokens(model, ids(1)))
    assert len(recorders) == 2
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(-1)  # in place: what is recorded reads it
    assert torch.equal(model.generate(ids(1), **OPTIONS), stock_tokens(model, ids(1)))
    model.bfloat16().generate(ids(1), **OPTIONS)
    assert len(recorders) == 3


def test_two_calls_at_once_do_not_share_tensors(recorders: list[FakeRecorder]) -> None:
    """A call within a call, as a draft that is its own target would make."""
    model = patched(tiny.model())
    inner: list[torch.Tensor] = []

    def stop(tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] == 15 and not inner:
            inner.append(model.generate(ids(1, seed=9), **OPTIONS))
        return torch.zeros(len(tokens), dtype=torch.bool)

    got = model.generate(ids(1), **OPTIONS, stopping_criteria=[stop])
    assert torch.equal(got, stock_tokens(model, ids(1)))
    assert torch.equal(inner[0], stock_tokens(model, ids(1, seed=9)))
    assert replays(recorders) == 10


# Refusals: the same tokens, and one line that says why.


def _hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: None)


def _with_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)


def _dispatched(model: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)


OBSTACLES = {
    "is an adapter's": _with_lora,
    "has a forward hook": _hooked,
    "has a hook of accelerate": _dispatched,
    "config.output_hidden_states": lambda model: setattr(model.config, "output_hidden_states", True),
    "training mode": lambda model: model.train(),
    "turned off by decode_graphs=False": lambda model: patch_model(model, decode_graphs=False),
    "graphs are of CUDA devices": lambda model: setattr(
        model._leet.decoding, "recorder_for", lambda device: "the model is on cpu: graphs are of CUDA devices"
    ),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_obstacles_are_reported_and_cost_no_error(reason: str, recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    OBSTACLES[reason](model)
    model.generate(ids(1), **OPTIONS)
    assert replays(recorders) == 0
    lines = [line for line in patch_report(model).host if line.startswith("decode graphs")]
    assert len(lines) == 1 and reason in lines[0], lines


def test_the_environment_turns_them_off(monkeypatch: pytest.MonkeyPatch, recorders: list[FakeRecorder]) -> None:
    monkeypatch.setenv("LEET_DECODE_GRAPHS", "0")
    model = patched(tiny.model())
    model.generate(ids(1), **OPTIONS)
    assert not recorders and "LEET_DECODE_GRAPHS=0" in str(patch_report(model))
    monkeypatch.setenv("LEET_DECODE_GRAPHS", "1")
    model.generate(ids(1), **OPTIONS)
    assert replays(recorders) == 10 and "decode graphs: on, 1 recorded" in str(patch_report(model))


def test_outputs_that_a_step_does_not_give_come_from_the_forward_itself(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    options = OPTIONS | {"return_dict_in_generate": True, "output_hidden_states": True}
    got, want = model.generate(ids(1), **options), stock_tokens(model, ids(1), **options)
    assert torch.equal(got.sequences, want.sequences) and len(got.hidden_states) == len(want.hidden_states) == 12
    assert replays(recorders) == 0
    model.generate(ids(1), **OPTIONS)  # the hooks that transformers leaves behind are no obstacle
    assert replays(recorders) == 10


@pytest.mark.parametrize("how", ["fails", "too large"])
def test_what_can_not_be_recorded_runs_as_it_is(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "operation not permitted\nwhen stream is capturing" if how == "fails" else None
    recorder = FakeRecorder(nbytes=1 << 30, fail=error)
    monkeypatch.setattr(Decoding, "recorder_for", staticmethod(lambda device: recorder))
    model = patched(tiny.model())
    for rows in (1, 2, 1):
        assert torch.equal(model.generate(ids(rows), **OPTIONS), stock_tokens(model, ids(rows)))
    assert recorder.replays == 0
    reason = "recording failed (RuntimeError: operation not permitted)" if error else "would hold over 200 MB"
    assert reason in str(patch_report(model))


def test_a_step_that_does_not_run_leaves_the_cache_to_the_forward(
    recorders: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched(tiny.model("linear-first"))  # the states are ahead of the layer that fails

    def broken(self: Any, base: Any, slots: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, 1, 7, dtype=torch.bool)  # no mask of this many slots

    monkeypatch.setattr("leet_hf.step.Step._mask", broken)
    assert torch.equal(model.generate(ids(2), **OPTIONS), stock_tokens(model, ids(2)))
    assert replays(recorders) == 0 and "a step does not run (RuntimeError" in str(patch_report(model))


def test_copies_and_pickles_of_a_model_have_their_own(recorders: list[FakeRecorder]) -> None:
    model = tiny_retnet.model()
    want = model.generate(ids(1), **OPTIONS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._leet.decoding is not model._leet.decoding and not other._leet.decoding.arenas
        assert torch.equal(other.generate(ids(1), **OPTIONS), want)


def test_nothing_is_left_after_unpatching_or_turning_off(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model("softmax-first"))
    model.generate(ids(1), **OPTIONS)
    patch_model(model, decode_graphs=False)
    assert not model._leet.decoding.arenas
    unpatch_model(patch_model(model))
    gc.collect()
    assert "_leet" not in model.__dict__ and "_leet" not in model.model.__dict__
    before = replays(recorders)
    model.generate(ids(1), **OPTIONS)
    assert replays(recorders) == before


def test_the_experts_implementation_is_changed_in_steps_alone(recorders: list[FakeRecorder]) -> None:
    model = patched(tiny.model())
    for chosen in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(chosen)
        assert torch.equal(model.generate(ids(2), **OPTIONS), stock_tokens(model, ids(2)))
        assert model.config._experts_implementation == chosen
    assert replays(recorders) == 10 + 11 + 11


def test_steps_that_would_copy_many_experts_are_refused(recorders: list[FakeRecorder], monkeypatch: Any) -> None:
    monkeypatch.setattr("leet_hf.experts.MOST_COPIED", 1000)
    model = patched(tiny.model())
    assert torch.equal(model.generate(ids(2), **OPTIONS), stock_tokens(model, ids(2)))
    assert replays(recorders) == 0 and "MB of experts' weights a layer" in str(patch_report(model))
