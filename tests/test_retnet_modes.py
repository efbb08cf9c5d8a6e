"""Every decoding mode of leet_hf's own RetNet, against cache-free forwards: of FLA's model, and of its other kinds."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import host_checks
import tiny
import tiny_retnet
from hosts import fla_retnet
from leet_hf.modes import Truth, check
from leet_hf.retnet import RetNetForCausalLM
from leet_hf.retnet.adapter import RetNetAdapter

# What tells kinds apart: how positions are counted, what the state holds, softmax layers, groups.
TELLING = {
    "port": (
        "beam", "left-padding", "middle-padding", "packed-lengths", "packed-positions", "chunked-prefill",
        "chat-padded-batch-in-chunks", "assisted-recurrent-draft", "early-exit", "recorded-outputs", "lora",
    ),
    "hybrid": (
        "beam", "left-padding", "middle-padding", "packed-lengths", "packed-positions", "chunked-prefill",
        "chat-padded-batch-in-chunks", "static-cache-given", "assisted-recurrent-draft", "compiled-forward",
        "recorded-outputs",
    ),
    "deepnorm": ("middle-padding", "packed-lengths", "multi-token", "static-cache-given"),
    "grouped": ("left-padding", "chunked-prefill", "static-cache-given", "lora"),
}  # fmt: skip
KINDS_AND_MODES = [(kind, name) for kind, names in TELLING.items() for name in names]


@functools.cache
def model_of(kind: str) -> Any:
    return tiny_retnet.model(kind)


@functools.cache
def truth_of(kind: str) -> Truth:
    """Cache-free forwards of the model itself. (They are torchscale's and its port's: tests of conversion.)"""
    return Truth(model_of(kind), tiny.prompts())


@functools.cache
def truth_of_fla() -> Truth:
    """Cache-free forwards of FLA's stand-in, with the same weights."""
    theirs = fla_retnet.RetNetForCausalLM(fla_retnet.RetNetConfig(**tiny_retnet.SIZES)).eval()
    theirs.load_state_dict(model_of("fla").state_dict())
    return Truth(theirs, tiny.prompts())


@pytest.mark.parametrize("name", host_checks.MODES)
def test_every_mode(name: str) -> None:
    # FLA's model records no attentions, and adapters of a fixed seed fall on its projections in another order.
    own = name in ("recorded-outputs", "lora")
    host_checks.must_agree(name, model_of("fla"), truth_of("fla") if own else truth_of_fla())


@pytest.mark.parametrize(("kind", "name"), KINDS_AND_MODES)
def test_telling_modes_of_other_kinds(kind: str, name: str) -> None:
    host_checks.must_agree(name, model_of(kind), truth_of(kind))


@pytest.mark.parametrize("kind", tiny_retnet.KINDS)
def test_tiny_models_are_worth_asking(kind: str) -> None:
    """Greedy outputs vary and no choice is close, so that equal tokens mean something."""
    truth = truth_of(kind)
    for prompt in truth.prompts:
        tokens = truth.greedy(prompt, host_checks.NEW)
        assert len(set(tokens[len(prompt) :])) >= 10
        best, second = truth.logits(tokens)[len(prompt) - 1 :].topk(2).values.unbind(-1)
        assert (best - second).min() > 2e-4


@pytest.mark.parametrize("kind", ["fla", "torchscale"])
def test_states_of_bfloat16_decoding_stay_float32(kind: str) -> None:
    model = model_of(kind)
    decays = {i: list(RetNetAdapter().decay(block.attn).log_decays) for i, block in enumerate(model.model.layers)
              if model.config.layer_types[i] == "linear_attention"}  # fmt: skip
    host_checks.states_stay_float32(model, decays)


@pytest.mark.parametrize("name", ["left-padding", "static-cache-given", "assisted-recurrent-draft"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    exact = copy.deepcopy(model_of("torchscale"))
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    rounded = copy.deepcopy(exact).bfloat16()
    assert type(rounded) is RetNetForCausalLM
    outcome = check(host_checks.MODES[name], rounded, truth=Truth(exact, tiny.prompts()), exact=False, tolerance=0.05)
    assert outcome.agrees, outcome.reason
