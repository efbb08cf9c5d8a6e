"""README's tables are those of the committed results, and a run of a part leaves the others' results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_readme_shows_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("readme")
    assert (BENCHMARKS / "results" / "step.json").exists()
    assert tables.readme() == tables.README.read_text(), "python benchmarks/readme.py"


def test_a_run_of_a_part_leaves_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")

    def rows(path: Path) -> dict[str, int]:
        return {row["what"]: row["ms"] for row in json.loads(path.read_text())["rows"]}

    common.write("x", {"rows": [{"what": name, "ms": 1} for name in "abc"]}, tmp_path)
    part = {"rows": [{"what": "b", "ms": 2}, {"what": "d", "ms": 2}]}
    path = common.write("x", part, tmp_path, part_by="what")
    assert list(rows(path).items()) == [("a", 1), ("b", 2), ("c", 1), ("d", 2)]
    old = json.loads(path.read_text())
    old["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(old))
    common.write("x", {"rows": [{"what": "b", "ms": 3}]}, tmp_path, part_by="what")
    assert rows(path) == {"b": 3}  # numbers of other versions do not mix
    common.write("x", part, tmp_path)
    common.write("x", {"rows": []}, tmp_path)
    assert rows(path) == {}
