"""The scripts in examples/ from their command line, with --smoke: what they write, and that it is what they say."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MiniMaxForCausalLM

import finetune
import finetune_lora
import generate
import sft
import train_from_scratch
from leet_hf.retnet import RetNetForCausalLM
from scripts import SHIPPED, run, save_small, save_small_retnet


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


def written(output: Path, summary: dict[str, Any], steps: int = 4) -> None:
    """The plot, the summary, whole checkpoints, and nothing half-made."""
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert max(entry["step"] for entry in summary["history"]) == steps
    assert {"train", "held_out"} <= set().union(*summary["history"])
    assert summary["seconds"] > 0 and summary["peak_memory_gib"] > 0
    assert (output / f"checkpoint-{steps}" / "trainer_state.json").exists()
    assert not [path for path in output.iterdir() if path.suffix in (".new", ".old")]


def test_finetune(tmp_path: Path) -> None:
    summary = run(finetune, tmp_path, "--smoke")
    written(tmp_path, summary)
    assert summary["held_out"]["after"] < summary["held_out"]["before"] < 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model) is MiniMaxForCausalLM
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert summary["sample"].startswith("And it came to pass")
    # Started again, the finished run is found, not repeated.
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert run(finetune, tmp_path, "--smoke")["held_out"] == summary["held_out"]
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_finetune_lora(tmp_path: Path) -> None:
    summary = run(finetune_lora, tmp_path, "--smoke")
    written(tmp_path, summary)
    assert summary["held_out"]["after"] < summary["held_out"]["before"]
    assert summary["difference_reloaded"] == 0 and summary["difference_merged"] < 1e-5
    names = {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    }
    assert {"qkv_proj", "out_proj", "output_gate", "q_proj", "k_proj", "v_proj", "o_proj"} <= names
    assert any("experts" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    stock, merged = (load_file(folder / "model.safetensors") for folder in (SHIPPED, tmp_path / "merged"))
    assert stock.keys() == merged.keys()
    assert summary["parameters"]["trained"] < summary["parameters"]["all"] / 4


def test_sft(tmp_path: Path) -> None:
    summary = run(sft, tmp_path, "--smoke")
    written(tmp_path, summary)
    assert summary["held_out"]["after"] < summary["held_out"]["before"]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Behold."}], tokenize=False
    )
    end = tokenizer.eos_token
    assert text == f"User: Why?{end}\nAnswer: Behold.{end}\n"


def test_sft_on_conversations_of_ones_own(small: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Moses and Aaron went."}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 41)
    summary = run(sft, tmp_path / "out", "--smoke", "--model", small, "--text", chats, "--steps", 2, "--every", 1)
    assert summary["question"] == "Who?" and summary["held_out"]["after"] < summary["held_out"]["before"]
    chats.write_text(json.dumps({"messages": turns}) + '\n{"text": "no messages"}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl line 2 is not a conversation: one .*messages"):
        run(sft, tmp_path / "other", "--smoke", "--model", small, "--text", chats)


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    summary = run(generate, tmp_path, "--smoke", "In the beginning", "Blessed are they that")
    assert summary["tokens"] == 16 and summary["texts"][1].startswith("Blessed are they that")
    out = capsys.readouterr().out
    assert "7 of 8 attention layers patched" in out and "resumed from" in out
    assert (tmp_path / "cache.safetensors").exists()
    # The streamed text is a beginning of what was written on from its saved cache.
    streamed = next(line for line in out.splitlines() if line.startswith("In the beginning"))
    assert summary["resumed"].startswith(streamed)


@pytest.mark.parametrize("script", [finetune, finetune_lora, sft], ids=lambda script: script.__name__)
def test_retnet(script: ModuleType, tmp_path: Path) -> None:
    model = save_small_retnet(tmp_path / "retnet")
    summary = run(script, tmp_path / "out", "--smoke", "--model", model, "--steps", 2, "--every", 1)
    written(tmp_path / "out", summary, steps=2)
    assert summary["held_out"]["after"] < summary["held_out"]["before"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / ("merged" if script is finetune_lora else "model"))
    assert type(merged) is RetNetForCausalLM


@pytest.mark.parametrize("script", [finetune, finetune_lora], ids=lambda script: script.__name__)
def test_checkpointing_changes_nothing(script: ModuleType, small: Path, tmp_path: Path) -> None:
    arguments = ("--smoke", "--model", small, "--steps", 2, "--every", 1)
    plain = run(script, tmp_path / "plain", *arguments)["history"]
    saved = run(script, tmp_path / "saved", *arguments, "--checkpointing")["history"]
    for entry, expected in zip(saved, plain, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("script", [finetune, finetune_lora, generate, sft, train_from_scratch])
def test_help(script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert {"--model", "--output", "--smoke"} <= set(re.findall(r"--[a-z]+", text))
    assert f"python examples/{script.__name__}.py --smoke" in text  # the command, from the docstring
