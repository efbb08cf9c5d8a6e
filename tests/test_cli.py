"""The command `leet-hf`, on a tiny random model and on the one that comes along."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

import tiny
from corpus import train_tokenizer
from leet_hf import adapters, demo
from leet_hf.cli import app
from leet_hf.modes import modes
from leet_hf.versions import cache_of


def invoke(*arguments: str, width: int = 100) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(width)})


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(list(demo.MODE_PROMPTS), vocabulary=300)
    tokenizer.save_pretrained(folder)
    tiny.model(vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


def test_demo_shows_text_speed_cache_and_every_mode(tiny_model: str) -> None:
    result = invoke("demo", "--model", tiny_model, "--prompt", "In the beginning", "--max-new-tokens", "8", "--why")
    assert result.exit_code == 0, result.output
    assert result.output.count("In the beginning") == 2
    for words in ("the same text", "time to first token", "tokens per second", "after 128 tokens", "after 4096 tokens"):
        assert words in result.output
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in result.output.splitlines() if "│" in line}
    for mode in modes(long=256):
        assert rows[mode.title][1].strip() == ("right" if mode.missing() is None else "not run"), mode.title
    for title, verdict in (("greedy", "right"), ("beam search", "wrong"), ("static cache", "not done")):
        assert rows[title][0].strip() == verdict, title
    assert "stock, prefill in chunks: ValueError: Cannot use prefill chunking" in result.output


def test_demo_fails_where_the_patched_model_is_wrong(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "patch_model", lambda model: model)
    beam = [mode for mode in modes() if mode.name in ("greedy", "beam")]
    monkeypatch.setattr(demo, "modes", lambda new, long: beam)
    result = invoke("demo", "--model", tiny_model, "--max-new-tokens", "8")
    assert result.exit_code == 1
    assert "stock 1, patched 1" in result.output and "patched, beam search: " in result.output


def test_demo_of_the_shipped_model() -> None:
    result = invoke("demo", "--max-new-tokens", "12", "--no-modes")
    assert result.exit_code == 0, result.output
    assert demo.PROMPT in result.output and "the same text" in result.output


@pytest.mark.parametrize(
    ("model", "words"),
    [("no/such/folder", "no/such/folder"), ("softmax", "UnsupportedModelError")],
)
def test_demo_refuses_what_it_can_not_load(model: str, words: str, tmp_path: Path, tiny_model: str) -> None:
    if model == "softmax":
        config = transformers.LlamaConfig(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
        model = str(tmp_path)
    result = invoke("demo", "--model", model, width=200)
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output


def test_streamed_text_is_broken_between_words() -> None:
    from rich.console import Console

    from leet_hf.show import Page

    console = Console(width=20, record=True)
    page = Page(console)
    for piece in ("In the ", "beginning God ", "created\n\nthe", " heaven"):
        page.write(piece)
    assert console.export_text() == "In the beginning God\ncreated\n\nthe heaven"


def test_cache_bytes_counts_every_tensor_once() -> None:
    model: Any = tiny.model()
    with torch.no_grad():
        cache = cache_of(model(input_ids=torch.zeros(1, 7, dtype=torch.int64), use_cache=True))
    states = sum(state.nbytes for state in cache.linear_cache if len(state))
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    assert states > 0 and kept > 0
    assert demo.cache_bytes(model, 7) == states + kept
    # 4 layers, 2 heads of 16, keys and values in float32.
    assert demo.softmax_cache_bytes(model, 7) == 4 * 2 * 16 * 2 * 4 * 7


def test_env_names_versions_devices_and_why_methods_can_not_run() -> None:
    result = invoke("env")
    assert result.exit_code == 0, result.output
    for package in ("torch", "transformers", "accelerate"):
        assert importlib.metadata.version(package) in result.output
    assert "cpu" in result.output
    lines = [line for line in result.output.splitlines() if "torch" in line and "yes" in line]
    assert lines, result.output


def test_models_names_every_adapter() -> None:
    """In full, where there is room; the names of families in full everywhere."""
    narrow, wide = invoke("models", width=80), invoke("models", width=250)
    assert narrow.exit_code == wide.exit_code == 0, narrow.output + wide.output
    assert adapters.adapters()
    for adapter in adapters.adapters():
        assert f" {adapter.name} " in narrow.output
        for words in (adapter.name, *adapter.layer_class.split(" or "), *adapter.base_class.split(" or ")):
            assert words in wide.output
        assert adapter.decay_formula in wide.output


def test_the_main_page_lists_every_mode_and_family() -> None:
    page = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", page, re.M)
    titles = [mode.title for mode in modes(long=256)]
    assert [row for row in rows if row in titles] == titles
    for adapter in adapters.adapters():
        assert f"`{adapter.name}`" in rows and adapter.decay_formula in page


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "env", "models"))
