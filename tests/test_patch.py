"""patch_model, unpatch_model and patch_report: what they change, what they put back, what they say."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    MiniMaxForCausalLM,
    MiniMaxForSequenceClassification,
)

import tiny
from leet_hf import (
    decay,
    patch_model,
    patch_report,
    unpatch_model,
)
from leet_hf.versions import cache_of
from patching import IDS, KINDS, lightning, outputs, refused, same, skip_unless_stock_pickles, snapshot


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
def test_every_head_gives_what_stock_gives(layout: str, kind: type) -> None:
    model = tiny.model(layout, kind=kind, pad_token_id=0)
    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    want, padded = outputs(model), outputs(model, attention_mask=mask)
    assert patch_model(model) is model
    same(outputs(model), want)
    real = slice(None) if kind is MiniMaxForSequenceClassification else slice(4, None)
    same(outputs(model, attention_mask=mask)[:, real], padded[:, real])
    same(outputs(model, use_cache=True), want)


def test_only_this_instance_changes() -> None:
    before = {cls: dict(cls.__dict__) for module in tiny.model().modules() for cls in type(module).__mro__}
    other = tiny.model()
    kept = snapshot(other)
    patch_model(tiny.model()).generate(IDS, max_new_tokens=2)
    assert snapshot(other) == kept
    for cls, attributes in before.items():
        assert {k: v for k, v in cls.__dict__.items() if not k.startswith("_abc")} == {
            k: v for k, v in attributes.items() if not k.startswith("_abc")
        }


def test_patching_twice_is_patching_once() -> None:
    model = patch_model(tiny.model())
    once = snapshot(model)
    assert patch_model(model) is model
    assert snapshot(model) == once
    assert patch_report(patch_model(model, method="torch")).layers[0].method == "torch"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_unpatching_restores_everything(kind: type) -> None:
    model = tiny.model(kind=kind)
    before, want = snapshot(model), outputs(model)
    assert unpatch_model(model) is model and snapshot(model) == before
    patch_model(model)
    assert snapshot(model) != before
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert torch.equal(outputs(model), want)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_patched_and_are_their_own(through: str) -> None:
    if through != "deepcopy":
        skip_unless_stock_pickles()
    model = patch_model(tiny.model())
    want = model.generate(IDS, max_new_tokens=20, do_sample=False)
    if through == "deepcopy":
        copied = copy.deepcopy(model)
    elif through == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert patch_report(copied).patched == 3
    for module in (copied.model, *lightning(copied)):
        assert module.forward.args[0] is module
    assert torch.equal(copied.generate(IDS, max_new_tokens=20, do_sample=False), want)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not outputs(copied).any() and outputs(model).any()
    unpatch_model(model)
    assert patch_report(copied).patched == 3
    unpatch_model(copied)
    assert all("forward" not in module.__dict__ for module in copied.modules())


def test_saved_files_are_those_of_stock(tmp_path: Path) -> None:
    stock, model = tiny.model(), patch_model(tiny.model())
    outputs(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    for name, saved in (("stock", stock), ("patched", model)):
        saved.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    assert "model.safetensors" in files and "config.json" in files
    for name in files:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    loaded = MiniMaxForCausalLM.from_pretrained(tmp_path / "patched")
    same(outputs(patch_model(loaded)), outputs(stock))
    model.load_state_dict(stock.state_dict())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decays_stay_float32(dtype: torch.dtype, when: str) -> None:
    model = tiny.model("all-linear")
    model = patch_model(model.to(dtype)) if when == "before" else patch_model(model).to(dtype)
    assert model.model.layers[1].self_attn.slope_rate.dtype == dtype
    for layer, module in enumerate(lightning(model)):
        log_decay = module._leet.log_decay(module.out_proj.weight)
        want = torch.tensor(decay.minimax(4, layer, 4))
        assert log_decay.dtype == torch.float32 and torch.equal(log_decay, want)
    assert all(layer.decay.startswith("formula") for layer in patch_report(model).layers)
    output = model(IDS, use_cache=True)
    assert cache_of(output).layers[0].recurrent_states[0].dtype == torch.float32


def test_slopes_that_are_not_the_formula_are_kept() -> None:
    """A layer moved elsewhere, as pruning does, decays as where it came from."""
    model = tiny.model("all-linear")
    module = model.model.layers[1].self_attn
    slopes = module.slope_rate.flip(0) * 1.3
    tables = (slopes, *module.decay_factors(slopes))
    for name, value in zip(("slope_rate", "query_decay", "key_decay", "diagonal_decay"), tables, strict=True):
        getattr(module, name).copy_(value)
    want = outputs(model)
    same(outputs(patch_model(model)), want)
    assert [layer.decay.split()[0] for layer in patch_report(model).layers] == [
        "formula",
        "buffer",
        "formula",
        "formula",
    ]


@pytest.mark.parametrize(
    "slopes, message", [([1.0, 2.0], "has 2 entries for 4 heads"), ([1.0] * 3 + [-1.0], "negative")]
)
def test_slopes_that_can_not_be(slopes: list[float], message: str) -> None:
    model = tiny.model()
    model.model.layers[2].self_attn.slope_rate = nn.Buffer(torch.tensor(slopes)[:, None, None])
    refused(model, rf"model\.layers\.2\.self_attn: slope_rate .*{message}")


def test_report() -> None:
    model = tiny.model()
    planned, patched = patch_report(model), patch_report(patch_model(model, method="torch"))
    assert (planned.patched, patched.patched) == (0, 3)
    assert [layer.status for layer in planned.layers] == ["not patched"] * 3 + ["left alone"]
    assert [layer.status for layer in patched.layers] == ["patched"] * 3 + ["left alone"]
    first, last = patched.layers[0], patched.layers[3]
    assert (first.name, first.index, first.adapter, first.method) == ("model.layers.0.self_attn", 0, "minimax", "torch")
    assert first.decay.startswith("formula -2^(-8(h+1)/H)")
    assert (last.index, last.adapter, last.reason) == (3, "", "MiniMaxAttention is no recurrent layer")
    assert planned.layers[0].method == "auto (torch)"
    text = str(patched)
    assert "3 of 4 attention layers patched" in text and "model (MiniMaxForCausalLM): generate()" in text
    assert all(len(line) == len(line.rstrip()) for line in text.splitlines())
