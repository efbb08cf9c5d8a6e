"""The training script, the model and the text that come along, and the code in the documents."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxForCausalLM

import corpus
import train_from_scratch as script
from leet_hf import patch_model

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "examples" / "assets"
SHIPPED = ASSETS / "kjv-minimax"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the training script writes with --smoke."""
    output = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_from_scratch.py", "--smoke", "--device", "cpu", "--output", str(output)])
        script.main()
    return output


def test_training_writes_a_stock_checkpoint(smoke: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(smoke)
    assert type(model) is MiniMaxForCausalLM
    assert "auto_map" not in json.loads((smoke / "config.json").read_text())
    assert model.config.layer_types == ["linear_attention"] * 7 + ["full_attention"]
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (smoke / "checkpoint.pt").exists()
    summary = json.loads((smoke / "summary.json").read_text())
    losses = [entry["held_out"] for entry in summary["history"]]
    # Guessing among the vocabulary costs log(512) = 6.2 nats.
    assert losses[-1] < losses[0] < 6
    assert abs(summary["held_out"]["loss"] - summary["held_out"]["loss_stock_forward"]) < 1e-4
    assert abs(summary["held_out"]["loss"] - min(losses)) < 0.02  # what weights in bfloat16 cost
    card = (smoke / "README.md").read_text()
    assert f"{summary['held_out']['loss']:.4f} nats" in card and summary["samples"][0] in card


def test_decay_tables_are_saved_in_full_precision(smoke: Path) -> None:
    tensors = load_file(smoke / "model.safetensors")
    fresh = MiniMaxForCausalLM(AutoModelForCausalLM.from_pretrained(smoke).config).state_dict()
    tables = [name for name in tensors if name.endswith(script.DECAY_TABLES)]
    assert len(tables) == 4 * 7
    assert all(torch.equal(tensors[name], fresh[name]) for name in tables)
    assert {t.dtype for name, t in tensors.items() if name not in tables} == {torch.bfloat16}


def test_a_stopped_run_goes_on_where_it_was(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = script.Settings(**script.SMOKE)
    measured, calls = script.held_out_loss, []

    def stop_in_the_second_epoch(*arguments: Any) -> float:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(script, "held_out_loss", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        script.run(settings, tmp_path, torch.device("cpu"))
    assert (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="other settings"):
        script.run(script.Settings(**script.SMOKE | {"seed": 1}), tmp_path, torch.device("cpu"))
    summary = script.run(settings, tmp_path, torch.device("cpu"))
    unbroken = json.loads((smoke / "summary.json").read_text())
    assert summary["settings"] == unbroken["settings"]
    assert summary["history"] == unbroken["history"]
    resumed, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path, smoke))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_stops_when_the_held_out_loss_no_longer_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 9.0, 9.0, 2.0, 2.0])
    monkeypatch.setattr(script, "held_out_loss", lambda *_: next(losses))
    settings = script.Settings(**script.SMOKE | {"epochs": 9, "patience": 1, "length": 64, "batch": 64})
    summary = script.run(settings, tmp_path, torch.device("cpu"))
    assert [entry["held_out"] for entry in summary["history"]] == [3.0, 2.0, 2.5]


def test_any_text_can_be_trained_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a text without empty lines" for i in range(60)))
    kept, held = corpus.split_sections(corpus.read_sections(str(text), None))
    assert (len(kept), held) == (59, ["line 20 of a text without empty lines"])
    text.write_text("too short")
    with pytest.raises(ValueError, match=r"text .*text\.txt has 1 lines; it must have at least 21"):
        corpus.read_sections(str(text), None)
    few, nowhere, accelerator = torch.arange(5), tmp_path / "none", Accelerator(cpu=True)
    with pytest.raises(ValueError, match="text gives 5 tokens"):
        script.train(torch.nn.Linear(1, 1), few, few, script.Settings(), nowhere, accelerator)
    with pytest.raises(ValueError, match="batch is 16, must be a multiple of accumulation times processes, 3"):
        script.train(torch.nn.Linear(1, 1), few, few, script.Settings(accumulation=3), nowhere, accelerator)


def test_the_text_is_whole_and_keeps_its_held_out_chapters_out() -> None:
    sections = corpus.read_sections(str(ASSETS / "kjv.txt.xz"), None)
    assert len(sections) == 1189
    assert sum(len(re.findall(r"^\d+ ", section.partition("\n\n")[2], re.M)) for section in sections) == 31102
    kept, held = corpus.split_sections(sections)
    assert len(held) == 30 and not set(kept) & set(held)


def test_shipped_files_are_small_enough_to_be_kept_in_git() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) <= 12_000_000


def test_shipped_model_has_the_held_out_loss_that_its_card_claims() -> None:
    summary = json.loads((SHIPPED / "summary.json").read_text())
    defaults = asdict(script.Settings())
    assert summary["settings"] == defaults | {"text": "kjv.txt.xz"}, "the script's defaults must be what made the model"
    model = patch_model(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32))
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    _, held = corpus.split_sections(corpus.read_sections(str(ASSETS / "kjv.txt.xz"), None))
    loss = script.held_out_loss(model, corpus.encode(held, tokenizer), defaults["length"], 4)
    assert loss == pytest.approx(summary["held_out"]["loss"], abs=1e-3)
    assert f"{summary['held_out']['loss']:.4f} nats" in (SHIPPED / "README.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "kernels/README.md", "examples/assets/kjv-minimax/README.md"])
def test_code_in_documents_runs(document: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "0")  # as a reader has it: kernels in the interpreter would take an hour
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    # The first block of the main page shows the idea, with names of the reader's own.
    for block in [b for b in blocks if "Trainer(" not in b]:
        exec(compile(block, document, "exec"), {})
    assert len(blocks) > 0
