"""What has to be settled before a test module is imported: no hub, one thread, Triton's interpreter without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CUDA = torch.cuda.is_available()
if not CUDA:
    # Triton reads this when a kernel is decorated, which is when the module that holds it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
# Tiny tensors gain nothing from more threads, and lose much where other programs want the cores too. What tests start
# as processes of their own reads the variable; torch, which is there already, has to be told.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# A compile test in each of many processes would start as many compiling ones as there are cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture
def auto_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' Auto classes, put back afterwards: whoever imports a package of models registers them for all."""
    from transformers.models.auto import configuration_auto, modeling_auto

    mappings = [configuration_auto.CONFIG_MAPPING, modeling_auto.MODEL_MAPPING]
    mappings += [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
    for mapping in mappings:
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recorders, of fake_graphs.py, that models make in a test."""
    from fake_graphs import FakeRecorder
    from leet_hf.decoding import Decoding

    made: list[FakeRecorder] = []

    def recorder_for(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder())
        return made[-1]

    monkeypatch.setattr(Decoding, "recorder_for", staticmethod(recorder_for))
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
