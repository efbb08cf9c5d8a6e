"""Families from remote code on a GPU, in float32: decoding modes against their stand-ins, which stay on the CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest

import host_checks
import test_adapter_bailing
import test_adapter_hypenet
import test_adapter_minimax_text_01
import test_adapter_retnet_fla
import test_adapter_retnet_port
import test_adapter_sala
import test_adapter_transnormer
import tiny
from leet_hf import patch_model
from leet_hf.modes import Truth

pytestmark = pytest.mark.gpu
STOCK: dict[str, Callable[[], Any]] = {
    "bailing 2.0": functools.partial(test_adapter_bailing.small, False),
    "bailing 2.5": functools.partial(test_adapter_bailing.small, True),
    "hypenet": test_adapter_hypenet.stock,
    "minicpm_sala": test_adapter_sala.stock,
    "minimax_text_01": test_adapter_minimax_text_01.stock,
    "retnet-port": test_adapter_retnet_port.stock,
    "transnormer": test_adapter_transnormer.stock,
    "retnet-fla": test_adapter_retnet_fla.stock,
}
# Without sampling, as generators of two devices give other numbers, and without what needs the stand-in on the device.
MODES = (
    "greedy", "left-padding", "beam", "chunked-prefill", "middle-padding", "packed-lengths", "packed-positions", "chat",
    "static-cache", "offloaded-cache", "reset", "reorder", "prompt-lookup", "assisted-recurrent-draft", "early-exit",
    "compiled-forward", "device-map",
)  # fmt: skip


@functools.cache
def truth_of(family: str) -> Truth:
    return Truth(STOCK[family](), tiny.prompts())


@functools.cache
def patched_of(family: str) -> Any:
    return patch_model(copy.deepcopy(truth_of(family).model).cuda())


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("name", MODES)
def test_float32_agrees_with_the_stand_in(name: str, family: str) -> None:
    host_checks.must_agree(name, patched_of(family), truth_of(family))
