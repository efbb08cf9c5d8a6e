"""The only place that knows how transformers differs from version to version; what is not here is the same in all."""

from __future__ import annotations

from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

__all__ = [
    "capture_outputs",
    "create_causal_mask",
    "create_recurrent_attention_mask",
    "create_sliding_window_causal_mask",
    "find_packed_sequence_indices",
    "merge_with_config_defaults",
]
