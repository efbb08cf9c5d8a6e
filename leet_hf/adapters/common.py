"""What adapters of several families use: checks of structure, comparison of slopes, rotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
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


def rotate_half(x: Tensor) -> Tensor:
    """[x1, x2] to [-x2, x1], by halves of the last dim (GPT-NeoX's order of rope channels)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
