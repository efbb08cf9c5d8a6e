"""leet_hf's RetNet as a Transformers model: outputs, losses, saving, copying, patching."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
import tiny_retnet
from leet_hf import patch_model, patch_report, unpatch_model
from leet_hf.modes.helpers import Side, padded
from leet_hf.modes.truth import relative_error
from leet_hf.retnet import RetNetForCausalLM, RetNetForSequenceClassification
from leet_hf.versions import CACHE, cache_of
from patching import snapshot

KINDS = list(tiny_retnet.KINDS)
ROWS = tiny.prompts((19, 30, 9))
IDS = torch.tensor([ROWS[0], ROWS[1][:19]])
TOLERANCE = 1e-4


@functools.cache
def model_of(kind: str) -> Any:
    return tiny_retnet.model(kind)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


# Saving and copying.


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()) and type(loaded) is RetNetForCausalLM
    said_by_saving = ("architectures", "dtype", "_name_or_path")
    before, after = (
        {name: value for name, value in config.to_dict().items() if name not in said_by_saving}
        for config in (tiny_retnet.config(kind), loaded.config)
    )
    assert after == before
    assert torch.equal(logits_of(loaded), logits_of(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("kind", ["fla", "port", "hybrid"])
def test_copied_and_pickled_it_is_the_same(kind: str) -> None:
    model = copy.deepcopy(model_of(kind))
    want = model.generate(IDS, max_new_tokens=20, do_sample=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin), logits_of(model))
        assert torch.equal(twin.generate(IDS, max_new_tokens=20, do_sample=False), want)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
    assert torch.equal(logits_of(model), logits_of(model_of(kind)))


def test_tied_embeddings_stay_one(tmp_path: Path) -> None:
    model = tiny_retnet.model("fla", tie_word_embeddings=True)
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path)
    loaded = RetNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embeddings.weight and loaded.lm_head.weight.shape == (140, 64)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_float64_and_half_precision() -> None:
    """Decays and states are as exact as the model: what float64 gives, float32 and bfloat16 approach."""
    exact = logits_of(copy.deepcopy(model_of("fla")).double())
    assert exact.dtype == torch.float64
    assert relative_error(logits_of(model_of("fla")), exact) <= 1e-5
    half = copy.deepcopy(model_of("fla")).bfloat16()
    with torch.no_grad():
        rounded = copy.deepcopy(half).double()
    assert relative_error(logits_of(half), logits_of(rounded)) <= 0.03


# Outputs.


def test_logits_to_keep() -> None:
    model, want = model_of("fla"), logits_of(model_of("fla"))
    for keep, kept in ((0, slice(None)), (1, slice(-1, None)), (5, slice(-5, None)), (torch.tensor([2, 7]), [2, 7])):
        got = model(IDS, logits_to_keep=keep).logits
        torch.testing.assert_close(got, want[:, kept], rtol=1e-5, atol=1e-5)


def test_loss_is_that_of_the_next_token_and_takes_what_trainers_give() -> None:
    model, labels = model_of("fla"), IDS.clone()
    labels[0, :7] = -100
    want = cross_entropy(logits_of(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(IDS, labels=labels).loss, want / count)
    torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=50).loss, want / 50)


@pytest.mark.parametrize("kind", ["fla", "port", "hybrid"])
def test_recorded_outputs(kind: str) -> None:
    model = copy.deepcopy(model_of(kind))
    model.set_attn_implementation("eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    seen = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    as_tuple = model(IDS, use_cache=False, return_dict=False)
    hook.remove()
    assert torch.equal(seen[0], out.hidden_states[1])
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], out.logits)
    last = model.model(IDS).last_hidden_state
    assert torch.equal(last, out.hidden_states[-1]) and torch.equal(model.lm_head(last), out.logits)
    for i, layer in enumerate(cache_of(out).layers):
        if model.config.layer_types[i] == "linear_attention":
            assert torch.equal(out.attentions[i], layer.recurrent_states[0])
        else:
            torch.testing.assert_close(out.attentions[i].sum(-1), torch.ones(2, 4, 19))
    assert model(IDS).hidden_states is None and model(IDS).attentions is None


def test_positions_may_be_left_out_wherever_pads_are() -> None:
    model = model_of("port")
    sides: tuple[Side, ...] = ("left", "right", "middle")
    for side in sides:
        ids, mask = padded(ROWS, side, torch.device("cpu"))
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(ROWS):
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
            torch.testing.assert_close(logits[i, mask[i].bool()], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["fla", "hybrid"])
def test_sequence_classification(kind: str, tmp_path: Path) -> None:
    """The last token that is no pad decides, wherever the pads are."""
    model = tiny_retnet.model(kind, cls=RetNetForSequenceClassification, num_labels=3, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is RetNetForSequenceClassification
    alone = torch.cat([loaded(torch.tensor([row])).logits for row in ROWS])
    assert alone.shape == (3, 3)
    for side in ("left", "right"):
        ids, mask = padded(ROWS, side, torch.device("cpu"))  # type: ignore[arg-type]
        out = loaded(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1]))
        torch.testing.assert_close(out.logits, alone, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(out.loss, cross_entropy(alone, torch.tensor([0, 2, 1])), rtol=0, atol=TOLERANCE)
    out.loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_softmax_layers_of_a_hybrid() -> None:
    """Against attention written out: heads of keys shared by two of queries, halves of a head rotated."""
    block = model_of("hybrid").model.layers[0].attn
    x = torch.randn(1, 13, 64, generator=torch.Generator().manual_seed(0))
    place, dim = torch.arange(13.0), 16
    turn = torch.outer(place, 10000.0 ** (-torch.arange(0, dim, 2) / dim)).repeat(1, 2)[:, None]  # [T, 1, D]

    def rotated(y: Tensor) -> Tensor:
        return y * turn.cos() + torch.cat([-y[..., dim // 2 :], y[..., : dim // 2]], -1) * turn.sin()

    q, k, v = (proj(x)[0].unflatten(-1, (-1, dim)) for proj in (block.q_proj, block.k_proj, block.v_proj))
    q, k, v = rotated(q), rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / dim**0.5
    scores = scores.masked_fill(place[:, None] < place, float("-inf")).softmax(-1)
    want = block.o_proj(torch.einsum("hts,shd->thd", scores, v).flatten(-2))
    got, _ = block(x, None, torch.arange(13)[None])
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-5)


def test_wrong_inputs_change_nothing() -> None:
    model = model_of("fla")
    cache = cache_of(model(IDS, use_cache=True))
    before = [layer.recurrent_states[0] for layer in cache.layers]
    with pytest.raises(ValueError, match="holds 2 rows but the input has 1"):
        model(IDS[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match="exactly one of them"):
        model(IDS, inputs_embeds=torch.zeros(2, 3, 64))
    with pytest.raises(ValueError, match="exactly one of them"):
        model()
    with pytest.raises(ValueError, match="of another model"):
        model_of("grouped")(IDS[:, :1], **{CACHE: cache})
    assert all(torch.equal(layer.recurrent_states[0], state) for layer, state in zip(cache.layers, before, strict=True))


# What transformers and patch_model find.


@pytest.mark.parametrize("kind", KINDS)
def test_plans_name_what_there_is(kind: str) -> None:
    model = model_of(kind)
    names = [name for name, _ in model.model.named_modules()]
    for pattern in model.config.base_model_tp_plan:
        found = [name for name in names if re.fullmatch(pattern.replace("*", r"\d+"), name)]
        assert len(found) == 2 or (pattern.endswith("gate_proj") and model.config.mlp_type == "ffn"), pattern
    assert set(model.config.base_model_pp_plan) <= set(names) | {"norm"}
    assert bool(model.config.base_model_tp_plan) != model.config.subln, "its norm is of the whole MLP"
    assert RetNetForCausalLM._can_compile_fullgraph and model.supports_gradient_checkpointing
    assert set(model._no_split_modules) == {"RetNetBlock"}


def test_patching_only_sets_the_method() -> None:
    model = copy.deepcopy(model_of("hybrid"))
    before, want = snapshot(model), logits_of(model)
    assert patch_model(model) is model and unpatch_model(model) is model
    assert snapshot(model) == before
    report = patch_report(patch_model(model, method="torch"))
    assert [layer.status for layer in report.layers] == ["left alone", "patched"]
    assert report.layers[1].method == "torch" and report.layers[1].decay == "formula log(1 - 2^(-5-h))"
    assert "model (RetNetModel): native: right as it is, nothing to patch" in report.host
    torch.testing.assert_close(logits_of(model), want, rtol=0, atol=1e-5)
    patch_model(model, method="auto")
    assert snapshot(model) == before
