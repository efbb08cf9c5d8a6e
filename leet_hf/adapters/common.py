"""What adapters of several families use: checks of structure, comparison of slopes, rotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# A formula in float32 and a buffer that was rounded to 16 bits agree within this. The absolute part is for float16,
# which can not hold the slopes of the last layer; as a decay it is immaterial for a hundred thousand tokens.
ROUNDING, TINY = 2.0**-7, 2.0**-24


def lacks(module: Any, names: Sequence[str]) -> str | None:
    """Which of the attributes a module does not have, as the end of a sentence about it; None if it has all."""
    lacking = [name for name in names if getattr(module, name, None) is None]
    return f"it has no {', '.join(lacking)}" if lacking else None


def is_a(module: nn.Module, class_name: str) -> bool:
    """Whether a class of a module's MRO has a name: FSDP2 and others derive a class per module."""
    return any(cls.__name__ == class_name for cls in type(module).__mro__)


def agree(log_decays: Sequence[float], formula: Sequence[float]) -> bool:
    """Whether log_decays, perhaps rounded to 16 bits, are those of a formula."""
    pairs = zip(log_decays, formula, strict=True)
    return all(abs(have - want) <= ROUNDING * abs(want) + TINY for have, want in pairs)


def decay_of_slopes(
    slopes: Tensor, depth: float, formula: tuple[float, ...], words: str
) -> tuple[tuple[float, ...], str]:
    """Log decays and their source, where a base model holds the slopes of all layers and scales them by their depth.

    The formula's (words: in words) where the slopes are its, whatever they were cast to, or are on the meta device,
    made there while weights were loaded. Raises ValueError for slopes that are no decays of that many heads.
    """
    if slopes.device.type == "meta":
        return formula, f"formula {words}"
    held = slopes.detach().double().flatten().tolist()
    if len(held) != len(formula):
        raise ValueError(f"the base model has {len(held)} slopes for {len(formula)} heads: give it one per head")
    if not all(0 < slope < math.inf for slope in held):
        raise ValueError("the base model's slopes hold one that is not positive and finite: make them again")
    own = tuple(-slope * depth for slope in held)
    if agree(own, formula):
        return formula, f"formula {words}"
    return own, "the base model's slopes, which are not the formula's, * (1 - l/(L-1) + 1e-5)"
