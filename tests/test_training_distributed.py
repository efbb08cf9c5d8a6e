"""Several processes (gloo; NCCL on GPUs) train as one, launched with the configs in examples/accelerate/."""

from __future__ import annotations

import json
import os
import socket
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
import finetune
from leet_hf.modes.truth import relative_error
from scripts import EXAMPLES, ROOT, run, save_small

CONFIGS = EXAMPLES / "accelerate"


def launch(config: str, script: Path, *arguments: object, devices: str = "") -> str:
    """What `accelerate launch` prints of two processes, on CPUs or on the GPUs of the given numbers, in float32."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext", EXAMPLES, ROOT / "tests")))
    path = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / config]
    command += ["--mixed_precision", "no", "--num_processes", 2, "--main_process_port", port]
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": devices, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, [*command, script, *arguments])],
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


def assert_trained_as(file: Path, kind: str, one: distributed_training.Result, tolerance: float) -> None:
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"kind": kind, "processes": "2"}
    got, (weights, losses) = load_file(file), one
    torch.testing.assert_close(got.pop("losses"), torch.tensor(losses), rtol=tolerance, atol=tolerance)
    assert got.keys() == weights.keys()
    untrained = distributed_training.model().state_dict()
    for key, want in weights.items():
        assert relative_error(got[key], want) <= tolerance, key
    moved = [relative_error(weights[key], untrained[key]) for key in weights if "proj" in key]
    assert min(moved) > 1e-3  # the steps did something that could have differed


@pytest.mark.parametrize(("name", "kind"), [("ddp", "DistributedDataParallel"), ("fully_shard", "fully_shard")])
def test_two_processes_train_as_one(
    name: str, kind: str, two_processes: Path, one_process: distributed_training.Result
) -> None:
    assert_trained_as(two_processes / f"{name}.safetensors", kind, one_process, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), [("ddp", "DistributedDataParallel"), ("fsdp2", "FSDPMiniMaxForCausalLM")])
def test_two_gpus_train_as_one(name: str, kind: str, tmp_path: Path) -> None:
    """Both configs as accelerate applies them, over NCCL, against one process on a CPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    launch(f"{name}.yaml", ROOT / "tests" / "distributed_training.py", tmp_path, devices="0,1")
    AcceleratorState._reset_state(reset_partial_state=True)
    one = distributed_training.by_accelerate(Accelerator(cpu=True))[1]
    assert_trained_as(tmp_path / f"{name}.safetensors", kind, one, 1e-4)


def test_a_script_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """finetune.py: twice the processes for half the accumulated batches, and one of them writes."""
    small = save_small(tmp_path / "small", num_experts_per_tok=4)
    arguments = ("--smoke", "--model", small)
    launch("ddp.yaml", EXAMPLES / "finetune.py", *arguments, "--accumulate", 1, "--output", tmp_path / "two")
    AcceleratorState._reset_state(reset_partial_state=True)
    one = run(finetune, tmp_path / "one", *arguments, "--accumulate", 2)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-5)
    assert [entry.keys() for entry in two["history"]] == [entry.keys() for entry in one["history"]]
    for got, want in zip(two["history"], one["history"], strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    weights, wanted = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    start = load_file(small / "model.safetensors")
    for name, want in wanted.items():
        # Adam gives elements whose gradient is next to nothing a step of any sign.
        assert relative_error(weights[name], want) <= max(1e-4, 0.02 * relative_error(start[name], want)), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_configs_are_what_accelerate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP of accelerate needs GPUs (above); that its config is read, and names a layer there is, is seen without."""
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
