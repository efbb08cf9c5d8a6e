"""The kernels compiled for an H100, on any machine: that they compile, fit, and load whole rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from compiled_for_hopper import CASES, STEPS
from leet_linear_attention.triton import tuning

HERE = Path(__file__).parent
SHARED = 227 << 10  # bytes that a block may use there
# Kernels that write, or read, a number a thread of what belongs to a token.
NARROW = {"step_kernel", "joined_kernel", "gated_pair_kernel"}
# Those whose work is products.
PRODUCTS = {"sweep_kernel", "scores_kernel", "wide_kernel", "rows_kernel"}
# Those that wait for little but the memory: the more of them share a processor, the more is on its way.
SHARING = {"joined_kernel": 6, "gated_pair_kernel": 6}


def compiled(case: str) -> list[dict[str, Any]]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_for_hopper.py"), case],
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_fit_and_load_whole_rows(case: str) -> None:
    found = compiled(case)
    assert len(found) >= 4
    for kernel in found:
        assert kernel["shared"] <= SHARED // SHARING.get(kernel["kernel"], 1), kernel
        assert kernel["narrow"] == 0 or kernel["kernel"] in NARROW, kernel
        assert kernel["products"] > 0 or kernel["kernel"] not in PRODUCTS, kernel
    if case == "steps":
        for kernel, (key_dim, value_dim, tokens, buffer) in zip(found, STEPS, strict=True):
            form = tuning.step_config(key_dim, value_dim, tokens, buffer, 2, -1)
            assert form is not None and kernel["shared"] <= tuning.step_bytes(form, key_dim, 2), kernel
