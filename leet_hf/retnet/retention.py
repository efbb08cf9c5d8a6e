"""Multi-scale retention: the recurrent layer of RetNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..adapters.base import Projected
from ..fused.norm import GATE_NAMES, rms_norm, way_of
from ..fused.rotary import turned
from ..layer import LayerBinding, layer_forward
from ..shapes import RecurrentShape
from ..slots import calls_own
from .adapter import RetNetAdapter
from .configuration_retnet import RetNetConfig
from .norms import NORMS, RetNetRMSNorm
from .positions import Positions
from .projections import ScaledLinear

# The norm of the heads has another name where flash-linear-attention fuses it with the gate.
FUSED_GATES = ("swish", "silu")


class RetNetRetention(nn.Module):
    """`o_t = q_t^T S_t / sqrt(K)`, `S_t = gamma S_{t-1} + k_t v_t^T` per head, then a norm per head and a gate.

    Sun et al., "Retentive Network", arXiv 2307.08621; names of flash-linear-attention's `MultiScaleRetention`.
    """

    def __init__(self, config: RetNetConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scaling = config.key_dim**-0.5
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_heads * config.key_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, config.kv_heads * config.key_dim, bias=bias)
        self.v_proj = ScaledLinear(hidden, config.kv_heads * config.value_dim, bias=bias)
        self.o_proj = ScaledLinear(config.num_heads * config.value_dim, hidden, bias=bias)
        norm = NORMS[config.head_norm_type](config.value_dim, config.norm_eps, bool(config.elementwise_affine))
        if config.use_output_gate:
            self.g_proj = nn.Linear(hidden, config.num_heads * config.value_dim, bias=bias)
            self.gate_fn = ACT2FN[config.gate_activation]
        if config.use_output_gate and config.fuse_norm and config.gate_activation in FUSED_GATES:
            self.g_norm_swish_gate = norm
        else:
            self.g_norm = norm
        self.feature_map = None if config.feature_map is None else ACT2FN[config.feature_map]
        adapter = RetNetAdapter()
        self._leet = LayerBinding(adapter, layer_idx, adapter.decay(self), config.method)

    @property
    def cache_shape(self) -> RecurrentShape:
        """What its cache layer holds."""
        config, spare = self.config, int(self.config.retention_scale == "score")
        return RecurrentShape(
            config.num_heads, config.kv_heads, config.kv_heads, config.key_dim, config.value_dim + spare
        )

    def forward(self, hidden_states: Tensor, position_embeddings: Positions, **kwargs: Any) -> tuple[Tensor, Any]:
        """hidden_states [B, T, hidden] to (output [B, T, hidden], the state if attentions are asked for, or None).

        kwargs: attention_mask, cache, packing: as `leet_hf.layer.layer_forward` takes them.
        """
        return layer_forward(self, hidden_states, position_embeddings, **kwargs)

    def project(self, hidden_states: Tensor, positions: Positions) -> Projected:
        """hidden_states [B, T, hidden] to q [B, T, H, K], k [B, T, Hkv, K] and v [B, T, Hkv, V]."""
        config = self.config
        q, k = (proj(hidden_states).unflatten(-1, (-1, config.key_dim)) for proj in (self.q_proj, self.k_proj))
        v = self.v_proj(hidden_states).unflatten(-1, (-1, config.value_dim))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        q, k = turned(q, k, positions.cos, positions.sin, config.position_embedding, method=self._leet.method)
        if config.retention_scale == "score":
            v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)  # its output is the sum of the scores
        return Projected(q, k, v, rest=positions.shrink)

    def finish(self, o: Tensor, hidden_states: Tensor, shrink: Tensor | None) -> Tensor:
        """The operator's output o [B, T, H, V] (and the sum of scores) to the layer's [B, T, hidden]."""
        config, wide = self.config, torch.promote_types(o.dtype, torch.float32)
        norm = self.g_norm_swish_gate if hasattr(self, "g_norm_swish_gate") else self.g_norm
        gate = self.g_proj(hidden_states) if config.use_output_gate else None
        if shrink is not None:
            o = self._rescaled(o, shrink)
        if self._fuses(norm, o, gate, hidden_states.dtype):
            o = rms_norm(
                o, norm.weight,
                eps=norm.eps,
                gate=None if gate is None else gate.unflatten(-1, (-1, config.value_dim)),
                activation=GATE_NAMES[config.gate_activation],
                each=False,
                dtype=hidden_states.dtype,
                method=self._leet.method,
            ).flatten(-2)  # fmt: skip
            return self.o_proj(o)
        o = norm(o.to(wide)).flatten(-2)
        if gate is not None:
            o = o * self.gate_fn(gate.to(o.dtype))
        return self.o_proj(o.to(hidden_states.dtype))

    def _fuses(self, norm: nn.Module, o: Tensor, gate: Tensor | None, dtype: torch.dtype) -> bool:
        """Whether one kernel does norm, gate and casts: its norm and gate are these, and nothing else acts on them."""
        if type(norm) is not RetNetRMSNorm or not calls_own(norm) or self.config.gate_activation not in GATE_NAMES:
            return False
        return way_of(self._leet.method, dtype, o, norm.weight, gate) != "torch"

    def _rescaled(self, o: Tensor, shrink: Tensor) -> Tensor:
        """o in float32, divided as torchscale does before the norm, without gradients; only the norm's eps can tell."""
        o = o * shrink
        return o if self.config.retention_scale == "decay" else o[..., :-1] / o[..., -1:].detach().abs().clamp(min=1)
