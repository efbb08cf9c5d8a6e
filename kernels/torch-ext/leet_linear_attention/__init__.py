"""Decayed linear attention for PyTorch: one operator, its decode state, and the methods that compute it."""

from .api import linear_attention, linear_attention_step, step_asks_the_device
from .compat import causal_linear_decoder
from .dispatch import available_methods
from .state import DecodeState

__all__ = [
    "DecodeState",
    "available_methods",
    "causal_linear_decoder",
    "linear_attention",
    "linear_attention_step",
    "step_asks_the_device",
]
