"""torchscale's RetNet as ported to transformers: logits, gradients, every mode against the stand-in, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import host_checks
import tiny
from hosts.retnet_port import RetNetConfig, RetNetForCausalLM, RetNetModel, steps_of_the_port
from leet_hf import patch_model
from leet_hf.decay import retnet, retnet_language_model
from leet_hf.modes import Truth
from leet_hf.modes.truth import relative_error


def stock(kind: Any = RetNetForCausalLM, **changes: Any) -> Any:
    return host_checks.make(kind, RetNetConfig(**changes))


@functools.cache
def truth() -> Truth:
    return Truth(stock(decoder_layers=2), tiny.prompts())


@functools.cache
def patched() -> Any:
    return patch_model(stock(decoder_layers=2))


# Of the port, attentions are the weights of its parallel form, which a recurrent layer never has.
@pytest.mark.parametrize("name", [name for name in host_checks.MODES if name != "recorded-outputs"])
def test_modes(name: str) -> None:
    host_checks.must_agree(name, patched(), truth())


OPTIONS: dict[str, dict[str, Any]] = {
    "as published": {"no_scale_embedding": False, "layernorm_embedding": True},
    "decay of language models": {"use_lm_decay": True, "use_glu": False, "tie_word_embeddings": True},
    "deepnorm": {"deepnorm": True},
    "a norm whose eps is felt": {"layernorm_eps": 1e-2},
    "values of 512": {"decoder_value_embed_dim": 1024, "decoder_retention_heads": 2, "decoder_layers": 1},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients(changes: dict[str, Any]) -> None:
    host_checks.same_logits_and_gradients(stock(**changes))


def test_checkpointing_hidden_states_and_tuples() -> None:
    host_checks.same_after_checkpointing(stock())
    host_checks.same_hidden_states(stock())


def test_gradients_of_padded_and_packed_rows() -> None:
    host_checks.same_padded_and_packed_gradients(stock())


def test_patched_and_back() -> None:
    host_checks.patched_and_back(stock(), "retnet-port", range(3), 3)


@pytest.mark.parametrize("name", ["greedy", "middle-padding", "prompt-lookup", "packed-lengths"])
def test_modes_of_values_cut_in_two(name: str) -> None:
    changes = OPTIONS["values of 512"] | OPTIONS["a norm whose eps is felt"]
    host_checks.must_agree(name, patch_model(stock(**changes)), Truth(stock(**changes), tiny.prompts()))


@torch.no_grad()
def test_the_ports_own_way_to_generate() -> None:
    for row in tiny.prompts()[:2]:
        got = steps_of_the_port(patched(), torch.tensor([row]), 20)
        assert got[0].tolist() == truth().greedy(row, 20)


@torch.no_grad()
def test_the_base_model_and_a_layer_alone() -> None:
    base, own = stock(RetNetModel), stock(RetNetModel)
    ids, mask = torch.tensor(tiny.prompts((13, 13))), torch.ones(2, 13, dtype=torch.int64)
    want = base(input_ids=ids)[0]
    patch_model(own)
    assert relative_error(own(ids, mask)[0], want) <= 1e-5
    mask[1, :4] = 0
    got = own(input_ids=ids, attention_mask=mask)
    assert relative_error(got[0][1, 4:], base(input_ids=ids[1:, 4:])[0][0]) <= 1e-5
    asked = own(input_ids=ids, output_retentions=True)
    assert len(asked.retentions) == 3 and all(map(torch.equal, asked.retentions, asked.attentions))
    x = torch.randn(2, 13, 32)
    want, got = (m.layers[0](x, base.retnet_rel_pos)[0] for m in (base, own))
    assert relative_error(got, want) <= 1e-5


def test_kept_and_loaded(tmp_path: Path) -> None:
    host_checks.kept_and_loaded(stock(), tmp_path)


def test_patched_after_wrapping(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    host_checks.patched_after_wrapping(stock(), tmp_path)


def test_states_stay_float32() -> None:
    host_checks.states_stay_float32(stock(), {0: list(retnet(4)), 2: list(retnet(4))})


def decays(model: Any) -> Any:
    patch_model(model)
    return model.model.layers[1].retention._leet.decay


def test_decays_are_a_formula_or_the_buffer() -> None:
    """Also of a model that was cast, and of heads whose decay float32 can not hold."""
    assert decays(stock().bfloat16()).log_decays == retnet(4)
    many = decays(stock(decoder_embed_dim=48, decoder_value_embed_dim=48, decoder_retention_heads=24))
    assert many.log_decays == retnet(24) and many.log_decays[-1] < 0
    language = decays(stock(use_lm_decay=True).half())
    assert language.log_decays == retnet_language_model(4) and "linspace" in language.source
    other = stock()
    other.model.retnet_rel_pos.decay.mul_(0.5)
    got = decays(other)
    assert got.log_decays == pytest.approx([g / 2 for g in retnet(4)]) and "no published formula" in got.source


def _changed(path: str, **values: Any) -> Any:
    model = stock()
    for name, value in values.items():
        setattr(model.get_submodule(path), name, value)
    return model


def _without(path: str, name: str) -> Any:
    model = stock()
    delattr(model.get_submodule(path), name)
    return model


SECOND, POSITIONS = "model.layers.1.retention", "model.retnet_rel_pos"
REFUSED: dict[str, tuple[Any, str]] = {
    "a projection": (
        lambda: _without(SECOND, "out_proj"),
        "a MultiScaleRetention, but it has no out_proj",
    ),
    "the norm": (lambda: _without(SECOND, "group_norm"), "it has no group_norm"),
    "the gate": (lambda: _without(SECOND, "gate_fn"), "it has no gate_fn"),
    "positions": (lambda: _without("model", "retnet_rel_pos"), "it has no retnet_rel_pos"),
    "angles": (lambda: _without(POSITIONS, "angle"), "of its retnet_rel_pos, it has no angle"),
    "other angles": (lambda: _changed(POSITIONS, angle=torch.ones(8)), "other rotations"),
    "too few decays": (lambda: _changed(POSITIONS, decay=-torch.ones(3)), "3 entries for 4 heads"),
    "no decays": (lambda: _changed(POSITIONS, decay=torch.ones(4)), "positive, infinite or NaN"),
    "the meta device": (lambda: _changed(POSITIONS, decay=torch.ones(4, device="meta")), "decay is on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_expected_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    host_checks.is_refused(make(), message)
