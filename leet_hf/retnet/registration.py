"""RetNet in transformers' Auto classes, without importing transformers before the user does.

The config is registered as soon as transformers' Auto classes are loaded, the models as soon as a config exists: the
modules of models import the Auto classes themselves, so that both at once would be a circle.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CONFIGS = "transformers.models.auto.configuration_auto"


def register_when_loaded() -> None:
    """Register RetNetConfig with AutoConfig: now if transformers' Auto classes are loaded, else when they are."""
    if hasattr(sys.modules.get(AUTO_CONFIGS), "AutoConfig"):
        register_config()
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())  # type: ignore[arg-type]


def register_config() -> None:
    """Make AutoConfig know model type "retnet", unless another package (flash-linear-attention) already does.

    That package takes the name in its turn where it is imported later: with it, the Auto classes give its models in
    either order, and `leet_hf.retnet` is used by its own classes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from .configuration_retnet import RetNetConfig

    if RetNetConfig.model_type not in CONFIG_MAPPING:
        AutoConfig.register(RetNetConfig.model_type, RetNetConfig)


@functools.cache
def register_models() -> None:
    """Make AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification know our RetNetConfig."""
    from transformers.models.auto import modeling_auto as auto

    from . import modeling_retnet as own
    from .configuration_retnet import RetNetConfig

    auto.AutoModel.register(RetNetConfig, own.RetNetModel)
    auto.AutoModelForCausalLM.register(RetNetConfig, own.RetNetForCausalLM)
    auto.AutoModelForSequenceClassification.register(RetNetConfig, own.RetNetForSequenceClassification)


class _WhenLoaded:
    """Finds the module of Auto configs as the other finders do, and registers ours after it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIGS:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_config()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
