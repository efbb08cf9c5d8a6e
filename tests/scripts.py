"""What tests of the example scripts share: running one in this process, and a small model with a real tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
import tiny_retnet

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SHIPPED = EXAMPLES / "assets" / "kjv-minimax"


def run(script: ModuleType, output: Path, *arguments: Any) -> dict[str, Any]:
    """What `python examples/SCRIPT --output OUTPUT ...` does, and its summary."""
    command = [Path(script.__file__ or "").name, "--output", str(output), *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        script.main()
    return json.loads((output / "summary.json").read_text())


def save_small_retnet(folder: Path) -> Path:
    """A tiny random RetNet of two layers with the shipped model's tokenizer, as a checkpoint."""
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tiny_retnet.model("fla", vocab_size=len(tokenizer), num_hidden_layers=2, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_small(folder: Path, **changes: Any) -> Path:
    """A tiny random model of two layers with the shipped model's tokenizer, as a checkpoint."""
    tokenizer: Any = AutoTokenizer.from_pretrained(SHIPPED)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "layer_types": [tiny.LINEAR, tiny.SOFTMAX],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tiny.model(**settings | changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
