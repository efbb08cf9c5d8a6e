"""RetNet as a Transformers model: RetNetConfig, RetNetModel, RetNetForCausalLM, RetNetForSequenceClassification."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_retnet import RetNetConfig
    from .modeling_retnet import (
        RetNetForCausalLM,
        RetNetForSequenceClassification,
        RetNetModel,
        RetNetPreTrainedModel,
    )

__all__ = [
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetForSequenceClassification",
    "RetNetModel",
    "RetNetPreTrainedModel",
]


# Imported at first use, as leet_hf's own names.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "configuration_retnet" if name == "RetNetConfig" else "modeling_retnet"
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
