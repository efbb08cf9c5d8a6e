"""MiniCPM-SALA: logits, gradients and every decoding mode against the stand-in, report, refusals."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import host_checks
import tiny
from hosts import lightning
from hosts.lightning import LIGHTNING, SPARSE, LightningConfig
from hosts.plain import ScaledRotaryTables
from hosts.sala import MiniCPMSALAForCausalLM
from leet_hf import decay as formulas
from leet_hf import patch_model, patch_report, unpatch_model
from leet_hf.modes import Truth
from leet_hf.modes.helpers import joined
from leet_hf.modes.truth import relative_error
from leet_hf.versions import CACHE, cache_of


def stock(**changes: Any) -> Any:
    return host_checks.make(MiniCPMSALAForCausalLM, LightningConfig(**changes))


@functools.cache
def truth() -> Truth:
    return Truth(stock(), tiny.prompts())


@functools.cache
def patched() -> Any:
    return patch_model(stock())


# The published lightning attention has no attentions to return, so there is no truth for them; embeddings, which the
# base model scales where it makes them itself, have a test of their own.
@pytest.mark.parametrize(
    "name", [name for name in host_checks.MODES if name not in ("recorded-outputs", "inputs-embeds")]
)
def test_modes(name: str) -> None:
    host_checks.must_agree(name, patched(), truth())


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "bare": {"qk_norm": False, "use_output_norm": False, "use_output_gate": False, "lightning_use_rope": False},
    "rope everywhere, no gates": {"attn_use_rope": True, "attn_use_output_gate": False, "attention_bias": True},
    "six heads": {"num_attention_heads": 6, "hidden_size": 48, "lightning_nkv": 6, "lightning_scale": "1/d"},
    "eager": {"attn_implementation": "eager", "lightning_scale": "1"},
    "lightning alone": {"mixer_types": (LIGHTNING,) * 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes), tokens=70)  # more than the rope tables hold


def test_gradient_checkpointing() -> None:
    host_checks.same_after_checkpointing(stock())


def test_patching_and_back() -> None:
    host_checks.patched_and_back(stock(), "minicpm_sala", [1, 2], 3)


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock())


def test_kept_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading leaves the tables of ropes to chance; here, to zeros."""
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(), {index: list(formulas.alibi(4)) for index in (1, 2)}, tokens=80)


def test_recorded_outputs() -> None:
    ids = torch.tensor(tiny.prompts((9,)))
    model = stock(attn_implementation="eager")
    want = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    got = patch_model(model)(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative_error(a, b) <= 1e-5
    assert [list(x.shape) for x in got.attentions] == [[1, 4, 9, 9], [1, 4, 8, 8], [1, 4, 8, 8]]
    assert relative_error(got.attentions[1], cache_of(got).layers[1].recurrent_states[0]) <= 1e-6


def test_embeddings_instead_of_tokens_come_scaled() -> None:
    prompt = tiny.prompts()[0]
    embeds = patched().get_input_embeddings()(torch.tensor([prompt])) * patched().config.scale_emb
    written = patched().generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert prompt + written[0].tolist() == truth().greedy(prompt, 6)


def test_the_loss_of_packed_sequences_is_that_of_each_alone() -> None:
    """Its own forward hands nothing on that it does not know: neither packing nor what the loss needs is lost."""
    rows = tiny.prompts()
    model = patched()
    ids = torch.tensor([joined(rows)])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = ids.masked_fill(positions == 0, -100)
    bounds = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    got = model(input_ids=ids, position_ids=positions, cu_seq_lens_q=bounds, labels=labels, num_items_in_batch=10)
    one = [torch.tensor([row]) for row in rows]
    want = sum(truth().model(input_ids=row, labels=row, num_items_in_batch=10).loss for row in one)
    torch.testing.assert_close(got.loss, want, rtol=1e-5, atol=1e-5)


def test_a_decoder_layer_called_alone() -> None:
    model, positions = stock(), torch.arange(7)[None]
    x = torch.randn(1, 7, 32)
    want = [layer(x, position_ids=positions)[0] for layer in model.model.layers]
    patch_model(model)
    masks = [torch.ones(7, 7, dtype=torch.bool).tril()[None, None], torch.ones(1, 7), None]
    for layer, mask, y in zip(model.model.layers, masks, want, strict=True):
        got = layer(x, position_ids=positions, attention_mask=mask)[0]
        torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)


def test_a_cache_grows_past_the_rope_tables() -> None:
    """Positions beyond `max_position_embeddings` make the tables longer, as in the host."""
    model = patch_model(stock(max_position_embeddings=8, attn_use_rope=True))
    tokens = tiny.prompts((30,))[0]
    want = unpatch_model(copy.deepcopy(model))(input_ids=torch.tensor([tokens])).logits
    cache, logits = None, []
    for token in tokens:
        output = model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, use_cache=True)
        cache = cache_of(output)
        logits.append(output.logits)
    assert relative_error(torch.cat(logits, 1), want) <= 1e-5


def scaled() -> Any:
    """Its ropes are of a class that makes other tables."""
    model = stock(attn_use_rope=True)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = ScaledRotaryTables(8, 10000.0, 64)
    return model


def test_scaled_ropes_are_those_of_their_tables() -> None:
    ids = torch.tensor(tiny.prompts((30,)))
    plain = stock(attn_use_rope=True)(input_ids=ids).logits
    assert relative_error(scaled()(input_ids=ids).logits, plain) > 1e-2
    host_checks.same_logits_and_gradients(scaled(), tokens=70)


def test_tables_that_a_cast_has_rounded_are_not_read() -> None:
    """The rope of a bfloat16 model is as exact as that of a float32 one."""
    ids = torch.tensor(tiny.prompts((60,)))
    want, model = stock(attn_use_rope=True)(input_ids=ids).logits, stock(attn_use_rope=True)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb.bfloat16().float()
    assert relative_error(model(input_ids=ids).logits, want) > 1e-4
    assert relative_error(patch_model(model)(input_ids=ids).logits, want) <= 1e-5


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("z_proj", "has no z_proj"),
        ("o_norm", "has no o_norm"),
        ("q_norm", "has no q_norm"),
        ("rotary_emb", "rotary_emb"),
    ],
)
def test_a_lightning_attention_that_lacks_a_part(part: str, message: str) -> None:
    model = stock()
    delattr(model.model.layers[2].self_attn, part)
    host_checks.is_refused(model, f"model.layers.2.self_attn .*{message}")


def test_refusals() -> None:
    model = stock()
    model.model.layers[1].self_attn.use_short_conv = True
    host_checks.is_refused(model, "use_short_conv")
    model = stock()
    model.model.layers[1].self_attn.rotary_emb.cos_cached[1:] = 1
    host_checks.is_refused(model, "layers.1.self_attn .*other tables than its base and dim make")
    model = scaled()
    model.model.layers[1].self_attn.rotary_emb.cos_cached.zero_()
    host_checks.is_refused(model, "not in the checkpoint")
    model = stock()
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 24)
    host_checks.is_refused(model, "k_proj gives 24 channels")
    model = stock()
    model.model.layers[0].self_attn = nn.Identity()
    host_checks.is_refused(model, "layers.0.self_attn is a Identity")
    model = stock()
    model.config.mixer_types = [LIGHTNING, SPARSE, LIGHTNING]
    host_checks.is_refused(model, "config.mixer_types says")
    model = stock()
    model.config.sliding_window = 16
    host_checks.is_refused(model, "set it to None")
    model = stock()
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: None
    host_checks.is_refused(model, "forward replaced already")


class LightningAttention(nn.Module):
    """Another module of that name."""


def test_others_of_that_name_are_left_alone() -> None:
    model = stock(mixer_types=(SPARSE,) * 3)
    model.model.layers[0].add_module("other", LightningAttention())
    host_checks.is_refused(model, "has no linear-attention layer")
    model = stock()
    model.model.layers[0].add_module("other", LightningAttention())
    assert patch_report(patch_model(model)).patched == 2


def test_stand_in_writes_varied_text() -> None:
    """The modes compare something: tokens differ, and the decays matter."""
    assert len(set(truth().greedy(tiny.prompts()[0], 18)[-18:])) > 4
    model = stock()
    ids = torch.tensor(tiny.prompts((21,)))
    before = model(input_ids=ids).logits
    kept = lightning.alibi_slopes
    try:
        lightning.alibi_slopes = lambda heads: [0.0] * heads
        assert relative_error(model(input_ids=ids).logits, before) > 1e-2
    finally:
        lightning.alibi_slopes = kept
