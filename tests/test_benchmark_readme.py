"""README's tables are those of the committed results."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_readme_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("readme")
    assert (BENCHMARKS / "results" / "step.json").exists()
    assert tables.readme() == tables.README.read_text(), "python benchmarks/readme.py"
