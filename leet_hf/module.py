"""`DecayLinearAttention`: a linear attention to put into a model of one's own, in the place of a softmax attention."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import decay as formulas
from .attend import attend
from .cache import RecurrentLayer
from .fused.norm import GATE_NAMES, rms_norm, way_of
from .fused.rotary import turned
from .layer import fixed_log_decay
from .shapes import RecurrentShape
from .slots import calls_own
from .upgrade import upgrade_layer
from .versions import CACHE, cache_argument

FORMULAS: dict[str, Callable[..., formulas.LogDecays]] = {
    "alibi": formulas.alibi,
    "bailing": formulas.bailing,
    "minimax": formulas.minimax,
    "minimax_text_01": formulas.minimax_text_01,
    "retnet": formulas.retnet,
    "retnet_language_model": formulas.retnet_language_model,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"swish": nn.functional.silu, "sigmoid": torch.sigmoid}
TEMPER = 16.0  # divides learned log decays: the gate_logit_normalizer of gated linear attention, arXiv 2312.06635


class DecayLinearAttention(nn.Module):
    """Decayed linear attention as a layer: projections, the operator, a norm per head, a gate, the output projection.

        S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t
        y = out_proj(gate(gate_proj(x)) * norm(o))

    Causal; time linear in the tokens; a state that does not grow. Called as attention layers of Transformers are, with
    their DynamicCache and StaticCache, padding masks and packed sequences; trains and decodes with the same kernels.

        attention = DecayLinearAttention(512, num_heads=8, decay="retnet", layer_idx=0)
        y, _ = attention(x)                                        # training: x, y [B, T, 512]
        cache = DynamicCache()
        y, _ = attention(x, past_key_values=cache)                 # the prompt
        y, _ = attention(next_x, past_key_values=cache)            # one more token

    Parameters are `q_proj`, `k_proj`, `v_proj`, `out_proj`, and `gate_proj`, `norm`, `decay_proj` where asked for.
    Fixed decays are settings, as the number of heads is: not in the state dict, and float32 whatever the module's
    dtype. A model that generates needs no `patch_model`; let its `config.layer_types` say "linear_attention" for such
    a layer, so that caches made for assisted decoding can take tokens back.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        num_key_value_heads: int | None = None,
        decay: str | Sequence[float] | None = "retnet",
        layer_idx: int = 0,
        num_layers: int | None = None,
        scale: float | None = None,
        gate: str | None = "swish",
        norm: bool = True,
        norm_eps: float = 1e-6,
        bias: bool = False,
        method: str = "auto",
    ) -> None:
        """
        Args:
            hidden_size: of inputs and outputs. num_heads: of queries, and of states.
            head_dim, value_dim: of each head's keys and values; default hidden_size / num_heads, and head_dim.
            num_key_value_heads: fewer heads of k and v, each shared by as many query heads; default num_heads.
            decay: how fast each head forgets. The name of a formula in `leet_hf.decay` ("retnet", "alibi", "minimax",
                ...); one log decay <= 0 per head; "learned": per token and head, `logsigmoid(decay_proj(x)) / 16`;
                None: never.
            layer_idx: the layer's place in the model, which is its place in a cache. num_layers: of the model, for
                formulas that depend on the depth ("minimax", "minimax_text_01", "bailing").
            scale: on the operator's output; default head_dim^-0.5.
            gate: "swish" (as RetNet), "sigmoid" (as lightning attention) or None. norm: RMSNorm of each head's output.
            bias: of the projections. method: of the operator, as `leet_hf.patch_model`.

        Raises ValueError for sizes that do not fit each other, and for unknown or impossible decays and gates.
        """
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size}, no multiple of num_heads, {num_heads}: give head_dim")
        self.hidden_size, self.num_heads, self.layer_idx = hidden_size, num_heads, layer_idx
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if self.num_key_value_heads < 1 or num_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads is {num_key_value_heads}, must divide num_heads, {num_heads}")
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate is {gate!r}, must be one of {', '.join(map(repr, GATES))}, or None")
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.decay, self.gate, self.method = decay if decay is None or isinstance(decay, str) else "given", gate, method
        self.log_decays = _log_decays(decay, num_heads, layer_idx, num_layers)
        self._kept: dict[Any, Tensor] = {}

        few, wide = self.num_key_value_heads, num_heads * self.value_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, few * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, few * self.value_dim, bias=bias)
        self.out_proj = nn.Linear(wide, hidden_size, bias=bias)
        self.gate_proj = None if gate is None else nn.Linear(hidden_size, wide, bias=bias)
        self.decay_proj = nn.Linear(hidden_size, num_heads) if self.decay == "learned" else None
        self.norm = nn.RMSNorm(self.value_dim, eps=norm_eps) if norm else None

    @property
    def cache_shape(self) -> RecurrentShape:
        """What its cache layer holds."""
        few = self.num_key_value_heads
        return RecurrentShape(self.num_heads, few, few, self.head_dim, self.value_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, hidden] to (output [B, T, hidden], None, or the state if attentions are asked for).

        Args:
            attention_mask: [B, T], or [B, past + T] with the tokens of a cache; 0 at pads, which are left out wherever
                they are.
            position_embeddings: cos and sin, [B or 1, T, R], of rotary positions as Transformers makes them; turns the
                first R channels of each head of q and k, by halves. Not needed: decays tell near from far.
            past_key_values, cache: two names of one argument: a DynamicCache or StaticCache, whose layer `layer_idx`
                this one takes. Before a compiled forward, call `leet_hf.upgrade_cache(cache, model)`.
            seq_idx: [B, T], or cu_seq_lens_q: [N + 1], of a single row: packed sequences, none of which sees another.
            kwargs: what Transformers gives attention layers besides; not used.

        Returns the state float32 [B, H, K, V]. Raises ValueError for a mask or a cache that does not fit; nothing is
        changed then.
        """
        self._check(hidden_states, attention_mask, position_embeddings)
        batch, tokens = hidden_states.shape[:2]
        past = cache_argument(past_key_values, cache)
        layer = None if past is None else self._layer_of(past, batch, tokens)
        if layer is not None and layer.has_tokens and (seq_idx is not None or cu_seq_lens_q is not None):
            raise ValueError(
                f"packed sequences were given with {CACHE} that holds tokens: give it one sequence per row"
            )
        q, k, v, log_decay = self.project(hidden_states, position_embeddings)
        o, state = attend(
            q, k, v, log_decay,
            scale=self.scale,
            method=self.method,
            mask=None if attention_mask is None else attention_mask[:, attention_mask.shape[1] - tokens :],
            seq_idx=seq_idx,
            cu_seqlens=cu_seq_lens_q,
            layer=layer,
            return_state=output_attentions,
        )  # fmt: skip
        return self.finish(o, hidden_states), state

    def project(
        self, hidden_states: Tensor, position_embeddings: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """hidden_states to q [B, T, H, K], k [B, T, Hkv, K], v [B, T, Hkv, V] and log_decay, [H], [B, T, H] or None.

        A derived class can put in here what acts on q and k: norms, a feature map, a convolution.
        """
        q, k = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.value_dim))
        if position_embeddings is not None:
            cos, sin = (table.unsqueeze(-2) for table in position_embeddings)
            q, k = turned(q, k, cos, sin, "rope_twice", method=self.method)
        if self.decay_proj is None:
            return q, k, v, fixed_log_decay(self.log_decays, q, self._kept)
        logits = self.decay_proj(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return q, k, v, nn.functional.logsigmoid(logits) / TEMPER

    def finish(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        """The operator's output o [B, T, H, V] to the layer's output [B, T, hidden]."""
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        norm = self.norm
        if type(norm) is nn.RMSNorm and calls_own(norm) and norm.weight.shape == o.shape[-1:]:
            dtype = norm.weight.dtype if gate is None else torch.promote_types(norm.weight.dtype, gate.dtype)
            if norm.eps is not None and way_of(self.method, dtype, o, norm.weight, gate) != "torch":
                o = rms_norm(
                    o, norm.weight,
                    eps=norm.eps,
                    gate=None if gate is None else gate.view(o.shape),
                    activation=GATE_NAMES[self.gate],
                    each=False,
                    dtype=dtype,
                    method=self.method,
                )  # fmt: skip
                return self.out_proj(o.flatten(-2))
        if self.norm is not None:
            o = self.norm(o.to(self.norm.weight.dtype))  # under autocast they differ
        o = o.flatten(-2)
        if gate is not None:
            assert self.gate is not None
            o = o * GATES[self.gate](gate)
        return self.out_proj(o)

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}" + (
            "" if self.num_key_value_heads == self.num_heads else f"/{self.num_key_value_heads}"
        )
        return (
            f"heads={heads}, dims={self.head_dim}, {self.value_dim}, decay={self.decay!r}, layer_idx={self.layer_idx}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}

    def _layer_of(self, cache: Any, batch: int, tokens: int) -> RecurrentLayer:
        layers = getattr(cache, "layers", ())
        layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not isinstance(layer, RecurrentLayer) or layer.shape != self.cache_shape:
            layer = upgrade_layer(cache, self.layer_idx, self.cache_shape, tokens)
        held = getattr(layer, "batch_size", batch)
        if held != batch:
            raise ValueError(
                f"{CACHE} holds {held} rows but the input has {batch}: use cache.batch_select_indices or "
                "cache.batch_repeat_interleave, or start from an empty cache"
            )
        return layer

    def _check(self, x: Tensor, mask: Tensor | None, positions: Any) -> None:
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states has shape {list(x.shape)}, must be [batch, tokens, {self.hidden_size}]")
        if mask is not None and (mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]):
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, must be [{x.shape[0]}, {x.shape[1]}], or longer by the "
                "tokens of the cache: give the mask of pads itself, not one made of it for softmax attention "
                "(transformers.masking_utils has create_recurrent_attention_mask)"
            )
        channels = 0 if positions is None else positions[0].shape[-1]
        if channels > self.head_dim:
            raise ValueError(
                f"position_embeddings has {channels} channels, must have {self.head_dim} (head_dim) or less"
            )


def recurrent_modules(model: nn.Module) -> list[DecayLinearAttention]:
    """The DecayLinearAttention layers in a model, by their place in its cache. Raises ValueError if two share one."""
    found = sorted((m for m in model.modules() if isinstance(m, DecayLinearAttention)), key=lambda m: m.layer_idx)
    for first, second in itertools.pairwise(found):
        if first.layer_idx == second.layer_idx:
            raise ValueError(
                f"two layers have layer_idx {first.layer_idx}: number them in their order, as each has a cache layer"
            )
    return found


def _log_decays(decay: Any, heads: int, layer: int, layers: int | None) -> formulas.LogDecays | None:
    """One fixed log decay per head; None where there are none, or they are learned."""
    if decay is None or decay == "learned":
        return None
    if isinstance(decay, str):
        formula = FORMULAS.get(decay)
        if formula is None:
            known = ", ".join(map(repr, (*FORMULAS, "learned")))
            raise ValueError(f"decay is {decay!r}, must be one of {known}, one log decay per head, or None")
        if len(inspect.signature(formula).parameters) == 1:
            return formula(heads)
        if layers is None:
            raise ValueError(f"decay is {decay!r}, which depends on the depth: give num_layers, how many the model has")
        return formula(heads, layer, layers)
    given = tuple(float(g) for g in decay)
    if len(given) != heads:
        raise ValueError(f"decay has {len(given)} entries for {heads} heads: give one log decay per head")
    if not all(-math.inf < g <= 0 for g in given):
        raise ValueError(f"decay holds {given}, must be finite logarithms <= 0: give log(gamma), with 0 < gamma <= 1")
    return given
