"""leet_hf: linear-attention language models in Hugging Face Transformers, right and fast with one line.

model = patch_model(AutoModelForCausalLM.from_pretrained(...))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .retnet.registration import register_when_loaded

if TYPE_CHECKING:
    from .adapters import register_adapter
    from .generation import upgrade_cache
    from .module import DecayLinearAttention
    from .patch import UnsupportedModelError, patch_model, patch_report, unpatch_model
    from .report import PatchReport
    from .saving import load_cache, save_cache

__version__ = "0.1.0"

__all__ = [
    "DecayLinearAttention",
    "PatchReport",
    "UnsupportedModelError",
    "__version__",
    "load_cache",
    "patch_model",
    "patch_report",
    "register_adapter",
    "save_cache",
    "unpatch_model",
    "upgrade_cache",
]

# Imported at first use: `import leet_hf` alone does not import transformers.
_HOMES = {
    "DecayLinearAttention": "module",
    "PatchReport": "report",
    "UnsupportedModelError": "patch",
    "load_cache": "saving",
    "patch_model": "patch",
    "patch_report": "patch",
    "register_adapter": "adapters",
    "save_cache": "saving",
    "unpatch_model": "patch",
    "upgrade_cache": "generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_loaded()  # RetNet in transformers' Auto classes
