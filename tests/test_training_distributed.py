"""Several processes (gloo on CPUs) train as one does, launched with the configs in examples/accelerate_configs/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.models.minimax import modeling_minimax

import distributed_training
from leet_hf.modes.truth import relative_error
from scripts import EXAMPLES, ROOT

CONFIGS = EXAMPLES / "accelerate_configs"


def launch(config: str, script: Path, *arguments: object) -> str:
    """What `accelerate launch` prints of two processes without a GPU."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext", EXAMPLES, ROOT / "tests")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, [*command, "--mixed_precision", "no", "--num_processes", 2, script, *arguments])],
        env=os.environ | settings, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    launch("ddp.yaml", ROOT / "tests" / "distributed_training.py", folder)
    return folder


@pytest.fixture(scope="module")
def one_process() -> distributed_training.Result:
    AcceleratorState._reset_state(reset_partial_state=True)  # what tests before this one settled on
    return distributed_training.by_accelerate(Accelerator(cpu=True))[1]


@pytest.mark.parametrize(("name", "kind"), [("ddp", "DistributedDataParallel"), ("fsdp2", "fully_shard")])
def test_two_processes_train_as_one(
    name: str, kind: str, two_processes: Path, one_process: distributed_training.Result
) -> None:
    file = two_processes / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"kind": kind, "processes": "2"}
    got, (weights, losses) = load_file(file), one_process
    torch.testing.assert_close(got.pop("losses"), torch.tensor(losses), rtol=1e-5, atol=1e-5)
    assert got.keys() == weights.keys()
    untrained = distributed_training.model().state_dict()
    for key, want in weights.items():
        assert relative_error(got[key], want) <= 1e-5, key
    moved = [relative_error(weights[key], untrained[key]) for key in weights if "proj" in key]
    assert min(moved) > 1e-3  # the steps did something that could have differed


def test_configs_are_what_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP of accelerate needs GPUs; that its config is read, and names a layer there is, can be seen without."""
    ddp, fsdp = (load_config_from_file(str(CONFIGS / name)) for name in ("ddp.yaml", "fsdp2.yaml"))
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP")
    assert (ddp.mixed_precision, fsdp.mixed_precision) == ("bf16", "bf16")
    settings = fsdp.fsdp_config
    assert hasattr(modeling_minimax, settings["fsdp_transformer_layer_cls_to_wrap"])
    for key, value in settings.items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(distributed_training.model())
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["MiniMaxDecoderLayer"]
