"""The benchmark of training steps: that it runs, that its contenders do the same work, and that it is counted right."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import ROOT


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("train_benchmark", ROOT / "benchmarks" / "train.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def test_contenders_do_the_same_work(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--tiny", "--no-peers", "--output", str(tmp_path)])
    bench.main()
    result = json.loads((tmp_path / "train.json").read_text())
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    by_case: dict[str, dict[str, dict]] = {}
    for row in result["rows"]:
        by_case.setdefault(row["case"], {})[row["who"]] = row
        assert row["ms"] > 0 and row["tokens/s"] > 0 and row["of matmul %"] > 0
    assert by_case.keys() == {"minimax B2 T64", "retnet B2 T64", "minimax B1 T128 checkpointed"}
    for case, rows in by_case.items():
        assert rows.keys() == ({"ours"} if case.startswith("retnet") else {"stock", "ours"})
        assert all(row["loss"] == pytest.approx(rows["ours"]["loss"], rel=1e-3) for row in rows.values())
        assert {row["flops"] for row in rows.values()} == {rows["ours"]["flops"]}


def test_rows_are_written_before_the_next_is_measured(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is cut in its third row keeps the two before."""
    rows = [{"case": "a", "who": who, "ms": ms, "tokens/s": 1e3} for who, ms in (("ours", 1.0), ("stock", 3.0))]

    def measured(*_: object) -> Iterator[dict]:
        yield from rows
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "rows_of", measured)
    monkeypatch.setattr(sys, "argv", ["train.py", "--tiny", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    kept = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert [(row["who"], row.get("x ours")) for row in kept] == [("ours", None), ("stock", 3.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.json", "train.png"]


def test_a_case_that_is_not_there(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--tiny", "--only", "gpt"])
    with pytest.raises(SystemExit, match="--only 'gpt' names no case; there are: minimax B2 T64, retnet B2 T64"):
        bench.main()


def test_models_have_the_sizes_they_are_named_for(bench: ModuleType) -> None:
    with torch.device("meta"):
        minimax, retnet = bench.minimax(False)["stock"](), bench.retnet(False)["ours"]()
    count = [sum(p.numel() for p in model.parameters()) / 1e9 for model in (minimax, retnet)]
    assert count == pytest.approx([1.25, 1.35], abs=0.01)
    tokens = 4 * 2048
    # Less the embedding table, which is looked up, and one of two experts.
    weights = count[1] * 1e9 - 32000 * 2048
    states = 24 * 8 * 2 * 256 * 512
    assert bench.flops(retnet, bench.Case("retnet", 4, 2048)) == pytest.approx(
        6 * tokens * (weights + states), rel=1e-3
    )
    weights = count[0] * 1e9 - 32000 * 2048 - 16 * 3 * 2048 * 4096
    added = 14 * 16 * 2 * 128 * 128 + 2 * 16 * 128 * 2048
    assert bench.flops(minimax, bench.Case("minimax", 4, 2048)) == pytest.approx(
        6 * tokens * (weights + added), rel=1e-3
    )
