"""Kernels of other packages without their tuning, which takes minutes and does not change what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def take_the_first_that_runs(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Triton's tuner takes the first configuration that fits the device; `put` is setattr, or monkeypatch.setattr."""
    from triton.runtime.autotuner import Autotuner

    prune, bench = Autotuner.prune_configs, Autotuner._bench

    def begin(self: Any, kwargs: dict[str, Any]) -> Any:
        self.taken = False
        return prune(self, kwargs)

    def once(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        if self.taken:
            return [math.inf] * 3
        times = bench(self, *args, config=config, **meta)
        self.taken = math.isfinite(times[0])
        return times

    put(Autotuner, "prune_configs", begin)
    put(Autotuner, "_bench", once)
