"""The benchmark of the named methods: what it times is right first, what it leaves out has a reason, and the README's
table is the committed results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("methods")
    for name in ("methods", "contenders", "common"):
        sys.modules.pop(name, None)


def tiny(bench: ModuleType, **more: object) -> object:
    plan = {"device": "cpu", "lengths": [40, 90], "heads": 2, "width": 8, "dtype": torch.float32}
    return bench.Plan(**{**plan, "call_seconds": 30.0, "seconds": 60.0, **more})


def measure(bench: ModuleType, plan: object, everyone: list, tokens: int = 40) -> dict[str, dict]:  # type: ignore[type-arg]
    rows = bench.measure(tokens, plan, everyone, until=float("inf"))
    return {row["method"]: row for row in rows}


def test_every_method_is_timed_or_left_out_with_a_reason(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan = tiny(bench)
    rows = measure(bench, plan, bench.contenders(plan, peers=True))
    assert next(iter(rows)) == "torch (auto)"
    for name in ("torch (auto)", "vanilla", "causal_dot_product", "lightning", "block_based", "fleet", "recursion"):
        assert rows[name]["ms"] > 0 and rows[name]["difference"] < 1e-5
        assert rows[name]["spread"]["least"] <= rows[name]["ms"]
    for name in ("triton", "fleet_triton", "causal_dot_product_triton"):
        assert "ms" not in rows[name] and rows[name]["left out"]
    assert all("ms" in row or row["left out"] for row in rows.values())
    assert sum(name.startswith("LeetDecoding") for name in rows) == 9


def test_wrong_results_are_not_timed(bench: ModuleType) -> None:
    plan = tiny(bench)
    everyone = bench.contenders(plan, peers=False)[:1]
    everyone += [
        bench.Contender("zeros", lambda q, k, v, rate: torch.zeros_like(v)),
        bench.Contender("nan", lambda q, k, v, rate: v * float("nan")),
        bench.Contender("raises", lambda q, k, v, rate: v.view(-1, 7, 13)),
    ]
    rows = measure(bench, plan, everyone)
    assert rows["zeros"]["left out"].startswith("wrong: 1.0e+00")
    assert rows["nan"]["left out"].startswith("wrong: inf")
    assert [c.last is not None and c.last[0] for c in everyone] == [40, 40, 40, False], "how long they take is known"
    assert rows["raises"]["left out"].startswith("RuntimeError")
    assert measure(bench, plan, everyone, 90)["raises"]["left out"].startswith("RuntimeError")


def test_a_default_that_gives_zeros_is_not_timed(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match="from the oracle at T=40: nothing was timed"):
        measure(bench, tiny(bench), [bench.Contender("torch", lambda q, k, v, rate: torch.zeros_like(v))])


def test_what_would_take_too_long_or_too_much_memory(bench: ModuleType) -> None:
    plan = tiny(bench, call_seconds=1.0)
    slow = bench.Contender("slow", lambda *_: pytest.fail("called"), quadratic=True, last=(10, 0.1))
    assert bench.refusal(slow, 40, plan) == "time: about 1.6 s a call"
    assert bench.refusal(slow, 30, plan) is None
    assert bench.refusal(slow, 10**7, plan).startswith("memory: ")


def test_the_readme_shows_the_committed_results(bench: ModuleType) -> None:
    assert (BENCHMARKS / "results" / "methods-cpu.json").exists()
    assert bench.readme() == bench.README.read_text(), "python benchmarks/methods.py --readme"


def test_the_default_is_the_fastest() -> None:
    """At every length measured, within a quarter of whatever was fastest: up to 128 tokens it is `vanilla` on a CPU,
    and the first in each round of measurements finds the caches cold."""
    for path in sorted((BENCHMARKS / "results").glob("methods*.json")):
        record = json.loads(path.read_text())
        for tokens in record["lengths"]:
            rows = {row["method"]: row for row in record["rows"] if row["tokens"] == tokens and "ms" in row}
            (default,) = (row["ms"] for name, row in rows.items() if name.endswith("(auto)"))
            fastest = min(rows.values(), key=lambda row: row["ms"])
            assert default <= 1.25 * fastest["ms"], (path.name, tokens, fastest["method"])
