"""The families of models that can be patched: a registry of adapters."""

from __future__ import annotations

from ..shapes import CacheSpec, RecurrentShape, SoftmaxShape
from .bailing import BailingAdapter
from .base import Adapter, Decay, Projected
from .minimax import MiniMaxAdapter
from .minimax_text_01 import MiniMaxText01Adapter
from .retnet_fla import FlaRetNetAdapter
from .retnet_port import PortRetNetAdapter
from .sala import HypeNetAdapter, SalaAdapter
from .transnormer import TransnormerAdapter

__all__ = [
    "Adapter",
    "CacheSpec",
    "Decay",
    "Projected",
    "RecurrentShape",
    "SoftmaxShape",
    "adapters",
    "register_adapter",
]

_registry: dict[str, Adapter] = {}


def adapters() -> tuple[Adapter, ...]:
    """Every registered adapter; the latest registered is asked first."""
    return tuple(reversed(_registry.values()))


def register_adapter(adapter: Adapter) -> Adapter:
    """Make `patch_model` know a family of models. Returns the adapter. examples/register_adapter.py shows a whole one.

    Raises TypeError if it is no Adapter instance, ValueError if another class has registered its name. Registering an
    instance of the same class again replaces it.
    """
    if not isinstance(adapter, Adapter):
        hint = "an instance, not the class" if isinstance(adapter, type) else "an instance of leet_hf.adapters.Adapter"
        raise TypeError(f"adapter is {adapter!r}, must be {hint}")
    known = _registry.get(adapter.name)
    if known is not None and type(known) is not type(adapter):
        raise ValueError(
            f"an adapter named {adapter.name!r} is registered already ({type(known).__name__}): choose another name"
        )
    _registry[adapter.name] = adapter
    return adapter


register_adapter(MiniMaxAdapter())
register_adapter(BailingAdapter())
register_adapter(SalaAdapter())
register_adapter(HypeNetAdapter())
register_adapter(MiniMaxText01Adapter())
register_adapter(FlaRetNetAdapter())
register_adapter(PortRetNetAdapter())
register_adapter(TransnormerAdapter())
