"""The example of an adapter for a model of one's own runs, and its model is patched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "register_adapter.py"


def test_the_example_runs() -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels" / "torch-ext")))
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 attention layers patched" in done.stdout and "buffer gamma" in done.stdout
    lists = [line.split(":")[1].split() for line in done.stdout.splitlines()[-2:]]
    assert lists[0] == lists[1] and len(set(lists[0])) > 3


def test_the_main_page_shows_its_adapter() -> None:
    """What README shows of it is what runs."""
    code, page = EXAMPLE.read_text(), (ROOT / "README.md").read_text()
    adapter = code[code.index("class EchoAdapter") : code.index("\n\n\ndef main")]
    assert adapter in page and "examples/register_adapter.py" in page
