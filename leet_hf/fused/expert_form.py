"""What form the experts of a mixture have, as Transformers' decorator of experts describes it on the module."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

MOE = "transformers.integrations.moe"  # where the decorator and what it gives a class are defined
_OTHER_FORMS = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


def is_plain(experts: nn.Module) -> bool:
    """Whether they are a gate and up projection in one and a down projection, no biases, all in one process."""
    flags, weights = experts.__dict__, experts._parameters  # looked up in every call on a CPU
    return (
        flags.get("has_gate", False)
        and not any(flags.get(flag, False) for flag in _OTHER_FORMS)
        and weights.get("gate_up_proj") is not None
        and weights.get("down_proj") is not None
    )


def has_default_gate(experts: nn.Module) -> bool:
    """Whether their class gates as Transformers does unless told otherwise: act(gate) * up of [gate | up]."""
    gate = getattr(type(experts), "_apply_gate", None)
    return getattr(gate, "__module__", None) == MOE and experts.__dict__.get("has_gate", False)


def may_stand_in(experts: Any, top_k_index: Tensor, implementations: Collection[str], device_type: str) -> bool:
    """Whether another forward may stand for one of these implementations of plain experts.

    Any other implementation, "eager" too, is somebody's choice.
    """
    return (
        is_plain(experts)
        and experts.config._experts_implementation in implementations
        and type(top_k_index) is Tensor
        and not torch.is_autocast_enabled(device_type)
    )
