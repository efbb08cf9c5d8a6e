"""MiniMax-Text-01 and MiniMax-M1 as their own repositories have them: slopes of the base model, tuples for caches."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import decay as formulas
from ..fused.glu import activation_name
from ..fused.norms import gated_norm
from ..fused.silu_split import silu_split, split_again
from ..hosts.head import STRICT_HEAD_METHODS
from ..hosts.lightning import Dialect, lightning_forward, lightning_layer_forward, softmax_in_context
from ..hosts.softmax import softmax_forward
from ..hosts.tables import tables_lack
from ..shapes import RecurrentShape, SoftmaxShape
from .base import Adapter, Decay, Projected
from .common import decay_of_slopes, lacks

VERSIONS = ("MiniMaxText01", "MiniMaxM1")


def _no_turns(base: Any, ready: Any) -> None:
    return None


class MiniMaxText01Adapter(Adapter):
    """`MiniMaxText01LightningAttention` and `MiniMaxM1LightningAttention`, in remote code of MiniMaxAI's repositories.

    One packed projection, SiLU over all of it, then per head [q | k | v]; no rope, scale 1; RMSNorm over all heads,
    times the sigmoid of a gate, then the output projection (`modeling_minimax_text_01.py`). The base model holds the
    slopes of all layers and hands each its own, as an argument. Softmax layers are made to use standard caches.
    """

    name = "minimax_text_01"
    layer_class = " or ".join(f"{version}LightningAttention" for version in VERSIONS)
    base_class = " or ".join(f"{version}Model" for version in VERSIONS)
    decay_formula = "-alibi_h * (1 - l/(L-1) + 1e-5)"
    base_forward = staticmethod(lightning_forward)
    layer_forward = staticmethod(lightning_layer_forward)
    softmax_forward = staticmethod(softmax_forward)
    head_methods = STRICT_HEAD_METHODS
    dialect = Dialect(turns=_no_turns, softmax=softmax_in_context, experts=True)

    def owns_layer(self, module: nn.Module) -> bool:
        return _is_one_of(module, "LightningAttention")

    def owns_base(self, module: nn.Module) -> bool:
        return _is_one_of(module, "Model")

    def misfit(self, layer: Any) -> str | None:
        lacking = lacks(layer, ["qkv_proj", "act", "norm", "output_gate", "out_proj", "num_heads", "head_dim"])
        if lacking is not None:
            return lacking
        wide = 3 * layer.num_heads * layer.head_dim
        made = getattr(layer.qkv_proj, "out_features", wide)
        return None if made == wide else f"its qkv_proj gives {made} channels where its heads need {wide}"

    def base_misfit(self, base: Any) -> str | None:
        lacking = lacks(base, ["embed_tokens", "layers", "norm", "config", "slopes"])
        if lacking is not None:
            return lacking
        if base.config.num_hidden_layers != len(base.layers):
            return (
                f"it has {len(base.layers)} layers and its config.num_hidden_layers is {base.config.num_hidden_layers}"
            )
        if getattr(base.config, "sliding_window", None) is not None:
            return (
                f"its config.sliding_window is {base.config.sliding_window}, which the published softmax layers and "
                "caches count in two ways: set it to None"
            )
        kinds = getattr(base.config, "attn_type_list", None) or [None] * len(base.layers)
        for (path, attention), kind in zip(self.attentions(base), kinds, strict=False):
            owned = self.owns_layer(attention)
            if kind is not None and owned != (kind == 0):
                return f"its {path} is a {type(attention).__name__} where config.attn_type_list says {kind!r}"
            reason = None if owned else _softmax_misfit(attention)
            if reason is not None:
                return f"its {path} is a {type(attention).__name__} and {reason}"
        return None

    def index(self, layer: nn.Module) -> int | None:
        index = getattr(layer, "layer_idx", None)
        return None if index is None else int(index)

    def shape(self, attention: Any) -> RecurrentShape | SoftmaxShape:
        if self.owns_layer(attention):
            heads, dim = attention.num_heads, attention.head_dim
            return RecurrentShape(heads, heads, heads, dim, dim)
        return SoftmaxShape(attention.num_key_value_heads, attention.head_dim)

    def decay(self, layer: Any) -> Decay:
        raise ValueError("the base model has the slopes of this layer: patch the base model, or a model with it")

    def decay_within(self, base: Any, layer: Any) -> Decay:
        """The formula; or the base model's slopes where they are not those of the formula."""
        layers = len(base.layers)
        index = next(i for i, (_, attention) in enumerate(self.attentions(base)) if attention is layer)
        formula = formulas.minimax_text_01(layer.num_heads, index, layers)
        return Decay(*decay_of_slopes(base.slopes, 1 - index / (layers - 1) + 1e-5, formula, self.decay_formula))

    def scale(self, layer: Any) -> float:
        return 1.0

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        packed = layer.qkv_proj(hidden_states)
        if activation_name(layer.act) == "silu":
            again = split_again(packed, layer.head_dim)
            return Projected(*silu_split(packed, layer.head_dim, method=layer._leet.method), again=again)
        q, k, v = layer.act(packed).unflatten(-1, (-1, 3 * layer.head_dim)).chunk(3, dim=-1)
        return Projected(q, k, v)

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        gate = layer.output_gate(hidden_states)
        return layer.out_proj(gated_norm(layer.norm, o.flatten(-2), gate, "sigmoid", method=layer._leet.method))


def _is_one_of(module: nn.Module, part: str) -> bool:
    names = {f"{version}{part}" for version in VERSIONS}
    return any(cls.__name__ in names for cls in type(module).__mro__)


def _softmax_misfit(attention: Any) -> str | None:
    if not _is_one_of(attention, "Attention"):
        return "neither lightning nor softmax attention as published"
    needed = ["q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "num_key_value_heads", "config", "attention_dropout"]
    return lacks(attention, needed) or tables_lack(getattr(attention, "rotary_emb", None))
