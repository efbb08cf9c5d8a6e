"""Runs that are stopped: they go on bit for bit, and neither a kill nor a full disk costs the last good checkpoint."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import finetune
import finetune_lora
import recipe
import sft
import train_from_scratch
from scripts import EXAMPLES, ROOT, run, save_small

RESULTS = {finetune: "model", finetune_lora: "merged", sft: "model"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adding up what experts give is not done in a fixed order on a GPU, in stock Transformers."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Ctrl-C in the given forward and backward of a training run, counted from 1."""
    whole, calls = Trainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        # SFTTrainer has a method of its own, which calls this one.
        with pytest.raises(KeyboardInterrupt):
            yield


def same_weights(one: Path, other: Path) -> None:
    got, want = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("script", RESULTS, ids=lambda script: script.__name__)
def test_a_stopped_run_ends_as_an_unbroken_one(script: ModuleType, small: Path, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, random numbers and the place in the data, over an epoch's end."""
    arguments = ("--smoke", "--model", small, "--characters", 3000, "--steps", 5)
    unbroken = run(script, tmp_path / "unbroken", *arguments)
    with stopped_at(6):  # two backwards a step, a checkpoint after two steps
        run(script, tmp_path / "stopped", *arguments)
    assert recipe.last_checkpoint(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-2"
    resumed = run(script, tmp_path / "stopped", *arguments)
    assert resumed["history"] == unbroken["history"]
    assert resumed["held_out"]["after"] == unbroken["held_out"]["after"]
    same_weights(*(tmp_path / name / RESULTS[script] for name in ("stopped", "unbroken")))


def test_a_kill_in_the_middle_of_a_save(small: Path, tmp_path: Path) -> None:
    """SIGKILL while the second checkpoint's optimizer is half on the disk."""
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(EXAMPLES), str(ROOT), str(ROOT / "kernels" / "torch-ext")]}
import torch, finetune
whole = torch.save
def save(content, file, *rest, **more):
    whole(content, file, *rest, **more)
    if "checkpoint-2" in str(file):
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
finetune.main()
"""
    arguments = ["--smoke", "--model", str(small), "--every", "1", "--steps", "3"]
    done = subprocess.run(
        [sys.executable, "-c", code, "--output", str(tmp_path / "killed"), *arguments],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "killed" / "checkpoint-2").exists()
    run(finetune, tmp_path / "killed", *arguments)
    run(finetune, tmp_path / "unbroken", *arguments)
    same_weights(tmp_path / "killed" / "model", tmp_path / "unbroken" / "model")


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, kept)


def test_a_full_disk_while_a_checkpoint_is_written(small: Path, tmp_path: Path) -> None:
    arguments = ("--smoke", "--model", small, "--every", 1, "--steps", 3)
    whole, weights = Trainer._save_checkpoint, (small / "model.safetensors").stat().st_size

    def save(trainer: Trainer, *rest: Any) -> None:
        if trainer.state.global_step < 2:
            return whole(trainer, *rest)
        with room_for(weights + 1000):  # the weights fit, the optimizer does not
            whole(trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", save)
        with pytest.raises(OSError, match=r"could not write .*checkpoint-2 .*make room.* goes on from .*checkpoint-1"):
            run(finetune, tmp_path / "full", *arguments)
    assert [path.name for path in tmp_path.glob("full/checkpoint-*")] == ["checkpoint-1"]
    run(finetune, tmp_path / "full", *arguments)
    run(finetune, tmp_path / "roomy", *arguments)
    same_weights(tmp_path / "full" / "model", tmp_path / "roomy" / "model")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_survives_a_write_that_fails(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "kept"

    def write(path: Path, text: str) -> None:
        if kind == "folder":
            path.mkdir()
            path /= "file"
        path.write_text(text)

    recipe.write_whole(target, lambda path: write(path, "old"))
    with room_for(1000), pytest.raises(OSError, match=r"could not write .*kept \(.*GiB are free there: make room"):
        recipe.write_whole(target, lambda path: write(path, "new" * 10_000))
    assert (target / "file" if kind == "folder" else target).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    recipe.write_whole(target, lambda path: write(path, "new"))
    assert (target / "file" if kind == "folder" else target).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_training_from_nothing_keeps_its_checkpoint_where_the_next_does_not_fit(tmp_path: Path) -> None:
    """The checkpoint of the first epoch is the same file as before, and the run goes on from it."""
    settings = train_from_scratch.Settings(**train_from_scratch.SMOKE | {"characters": 10_000, "length": 32})
    whole, checkpoint, kept = torch.save, tmp_path / "checkpoint.pt", []

    def save(*arguments: Any) -> None:
        if not checkpoint.exists():
            return whole(*arguments)
        kept.append(checkpoint.read_bytes())
        with room_for(10_000):
            whole(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match=r"could not write .*checkpoint\.pt .*: make room or give another --output"):
            train_from_scratch.run(settings, tmp_path, torch.device("cpu"))
    assert [checkpoint.read_bytes()] == kept and not list(tmp_path.glob("*.new"))
    summary = train_from_scratch.run(settings, tmp_path, torch.device("cpu"))
    assert [entry["step"] // summary["steps_per_epoch"] for entry in summary["history"]] == [1, 2]
