"""The only place that knows how transformers differs from version to version; what is not here is the same in all."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

__all__ = [
    "CACHE",
    "cache_argument",
    "cache_of",
    "capture_outputs",
    "create_causal_mask",
    "create_recurrent_attention_mask",
    "create_sliding_window_causal_mask",
    "find_packed_sequence_indices",
    "merge_with_config_defaults",
]

# What forwards, generate() and outputs call the cache: "cache" from transformers 5.24 on, with the old name until 5.40.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def cache_argument(past_key_values: Any, cache: Any) -> Any:
    """The cache a forward was given, by either of its names. Raises ValueError if both were given."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(f"past_key_values and cache are two names of one argument: give only {CACHE}")
    return cache if past_key_values is None else past_key_values


def cache_of(output: Any) -> Any:
    """The cache in what a forward or generate() returned."""
    return getattr(output, CACHE)
