"""The operator's time over the length of a sequence, against its peers in the same run: the second plot of `ops.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import timed

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

Contender = Callable[[dict[str, Any]], Callable[[], torch.Tensor] | None]


def rows(contenders: dict[str, Contender], inputs: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Milliseconds forward of every contender that takes a length, a row a length.

    inputs: of so many tokens, what contenders take.
    """
    for tokens in LENGTHS:
        x = inputs(tokens)
        row: dict[str, Any] = {"tokens": tokens}
        for name, make in contenders.items():
            try:
                function = make(x)
                if function is not None:
                    with torch.no_grad():
                        row[f"{name} ms"] = timed(function, rep=20)["median"]
            except Exception as error:
                if name == "ours":
                    raise
                row[f"{name} refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def plot(found: list[dict[str, Any]], names: list[str], path: Path, title: str) -> None:
    """Both axes are logarithmic: a line of slope one is linear in the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name in names:
        points = [(row["tokens"], row[f"{name} ms"]) for row in found if f"{name} ms" in row]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("milliseconds, forward")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
