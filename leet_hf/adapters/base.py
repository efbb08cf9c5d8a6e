"""What an adapter is: all that leet_hf has to know about one family of host modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layer import layer_forward
from ..shapes import CacheSpec, RecurrentShape, SoftmaxShape
from .common import is_a


@dataclass(frozen=True)
class Decay:
    """Fixed decays of a layer: one log_decay per state head, and where they come from, in words."""

    log_decays: tuple[float, ...]
    source: str


class Projected(NamedTuple):
    """What a layer projects its input to.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V] in one dtype; log_decay None where the layer's decays are fixed,
    else float32 [B, T, H]; rest: whatever `finish` needs besides. again: makes q, k and v once more, bit for bit, from
    what autograd keeps anyway, so that it need not keep them; None where that can not be.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    rest: Any = None
    again: Callable[[], tuple[Tensor, ...]] | None = None


class Adapter(ABC):
    """Knows one family of host modules: recognises it, projects to q, k, v and log_decay, finishes the output.

    An adapter has no state of its own and never sees a cache, a mask or a kernel. Register an instance with
    `leet_hf.register_adapter`; its class must be importable, as patched models are pickled with a reference to it.

    name: of the family, as in the report. layer_class, base_class: class names of the recurrent module and of the base
    model that owns it (names, so that no remote code has to be imported). base_forward: replaces the base model's
    forward; it makes the masks and hands standard caches to the layers. layer_forward: replaces the recurrent layer's
    forward; a family whose decoder layers call theirs in another way wraps the common one. softmax_forward: replaces
    the forward of softmax layers that know only the host's own caches; None where they know standard ones.
    decay_formula: in words, for people. head_methods: by name, what replaces methods of a model that generates, where
    its own know nothing of standard caches; its "forward" may be among them.
    """

    name: str
    layer_class: str
    base_class: str
    decay_formula: str
    base_forward: Callable[..., Any]
    layer_forward: Callable[..., Any] = staticmethod(layer_forward)
    softmax_forward: Callable[..., Any] | None = None
    head_methods: Mapping[str, Callable[..., Any]] = {}

    def owns_layer(self, module: nn.Module) -> bool:
        """Whether a module is, by its class, a recurrent layer of this family."""
        return is_a(module, self.layer_class)

    def owns_base(self, module: nn.Module) -> bool:
        """Whether a module is, by its class, a base model of this family."""
        return is_a(module, self.base_class)

    def owns_softmax(self, attention: nn.Module) -> bool:
        """Whether the forward of an attention module is replaced by `softmax_forward`."""
        return self.softmax_forward is not None and not self.owns_layer(attention)

    @abstractmethod
    def misfit(self, layer: nn.Module) -> str | None:
        """Why this adapter can not serve a layer it owns (its structure is not as expected), or None if it can."""

    @abstractmethod
    def base_misfit(self, base: nn.Module) -> str | None:
        """As `misfit`, for the base model."""

    @abstractmethod
    def index(self, layer: nn.Module) -> int | None:
        """The layer's place among the decoder layers, which is its place in the cache; None if it does not say."""

    @abstractmethod
    def shape(self, attention: nn.Module) -> RecurrentShape | SoftmaxShape:
        """What the cache of an attention module, recurrent or softmax, is made of."""

    def attentions(self, base: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules of a base model in the order of its decoder layers, with their paths in it."""
        return [(f"layers.{i}.self_attn", block.self_attn) for i, block in enumerate(base.layers)]  # type: ignore

    def cache_spec(self, base: nn.Module) -> CacheSpec:
        """The shapes of every decoder layer of a base model."""
        return tuple(self.shape(attention) for _, attention in self.attentions(base))

    @abstractmethod
    def decay(self, layer: nn.Module) -> Decay | None:
        """The layer's fixed decays, or None if `project` gives them per token."""

    def decay_within(self, base: nn.Module, layer: nn.Module) -> Decay | None:
        """As `decay`, where the base model has a say: it holds the decays, or knows how many layers there are.

        Raises ValueError, as `decay`, for decays that can not be served.
        """
        return self.decay(layer)

    @abstractmethod
    def scale(self, layer: nn.Module) -> float:
        """The factor on the operator's output."""

    @abstractmethod
    def project(self, layer: nn.Module, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        """hidden_states [B, T, hidden] to q, k, v. Calls the projections as modules, so that adapters (LoRA) act."""

    @abstractmethod
    def finish(self, layer: nn.Module, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        """The operator's output o [B, T, H, V] to the layer's output [B, T, hidden]."""
