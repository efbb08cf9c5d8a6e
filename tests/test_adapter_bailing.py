"""Ring / Ling linear 2.0 and 2.5: logits, gradients and every decoding mode against the stand-in, refusals."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import host_checks
import tiny
from hosts.bailing import BailingConfig, BailingMoeLinearV2ForCausalLM, BailingMoeV2_5ForCausalLM
from leet_hf import patch_model
from leet_hf.modes import Truth

VERSIONS: dict[str, Any] = {"2.0": BailingMoeLinearV2ForCausalLM, "2.5": BailingMoeV2_5ForCausalLM}


def stock(version: str, **changes: Any) -> Any:
    latent = {"kv_lora_rank": 10} if version == "2.5" else {}
    return host_checks.make(VERSIONS[version], BailingConfig(**latent | changes))


@functools.cache
def truth_of(version: str) -> Truth:
    return Truth(stock(version), tiny.prompts())


@functools.cache
def patched_of(version: str) -> Any:
    return patch_model(stock(version))


# The published linear attention refuses output_attentions, so there is no truth for them.
MODES = [name for name in host_checks.MODES if name != "recorded-outputs"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODES)
def test_modes(name: str, version: str) -> None:
    host_checks.must_agree(name, patched_of(version), truth_of(version))
