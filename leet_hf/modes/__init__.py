"""The decoding modes as data: every way to run a model with a cache, with a truth to compare it with.

    truth = Truth(stock_model, prompts)
    for mode in modes():
        print(mode.title, check(mode, model, truth=truth))

The truth is always cache-free: forwards of the stock model over the whole sequence, each row alone, without padding.
"""

from __future__ import annotations

from .assisting import assisting_modes
from .base import Answer, Expected, Mode, ModeError, Outcome, Row, check
from .batching import batching_modes
from .continuing import continuing_modes
from .generating import generating_modes
from .placing import placing_modes
from .truth import Prompts, Truth

__all__ = ["Answer", "Expected", "Mode", "ModeError", "Outcome", "Prompts", "Row", "Truth", "check", "modes"]


def modes(new: int = 24, long: int = 2048) -> list[Mode]:
    """All modes, in the order to show them.

    new: tokens written in each mode; more than a decode buffer holds (16) shows more. long: steps of bfloat16 decoding.
    """
    return [
        *generating_modes(new),
        *batching_modes(new),
        *continuing_modes(new),
        *assisting_modes(new),
        *placing_modes(new, long),
    ]
