"""A decoder layer of RetNet: retention (or softmax attention) and MLP, each with norm and residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ..fused.glu import activation_name, gated
from .attention import RetNetAttention
from .configuration_retnet import RetNetConfig
from .norms import NORMS
from .positions import Positions
from .projections import ScaledLinear
from .retention import RetNetRetention


class RetNetMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`; with Sub-LN, a norm before `down`."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.mlp_size, config.mlp_bias
        self.dropout = config.activation_dropout
        glu = config.mlp_type == "glu"
        self.gate_proj = ScaledLinear(hidden, inner, bias=bias) if glu else None
        self.up_proj = (nn.Linear if glu else ScaledLinear)(hidden, inner, bias=bias)
        self.down_proj = ScaledLinear(inner, hidden, bias=bias)
        self.norm = NORMS[config.subln_type](inner, config.norm_eps) if config.subln else None
        self.act_fn = ACT2FN[config.hidden_act]
        self.activation, self.method = activation_name(self.act_fn), config.method

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        elif self.activation is None:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = gated(self.gate_proj(x), self.up_proj(x), self.activation, method=self.method)
        inner = nn.functional.dropout(inner, self.dropout, self.training)
        return self.down_proj(inner if self.norm is None else self.norm(inner))


class RetNetBlock(GradientCheckpointingLayer):
    """One decoder layer."""

    def __init__(self, config: RetNetConfig, layer_idx: int) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        softmax = next((spec for spec in config.softmax_specs if layer_idx in spec["layers"]), None)
        self.norm_first, self.residual_scale = config.norm_first, config.residual_scale
        self.dropout = config.dropout
        self.drop_path = config.drop_path_rate * layer_idx / max(config.num_hidden_layers - 1, 1)
        self.attn_norm = norm(config.hidden_size, config.norm_eps)
        self.attn: nn.Module = (
            RetNetRetention(config, layer_idx) if softmax is None else RetNetAttention(config, layer_idx, softmax)
        )
        self.mlp_norm = norm(config.hidden_size, config.norm_eps)
        self.mlp = RetNetMLP(config)

    def forward(self, hidden_states: Tensor, position_embeddings: Positions, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, hidden] to the same. kwargs: masks, cache and packing, for the attention."""
        hidden_states, residual = self._normed(self.attn_norm, hidden_states), hidden_states
        hidden_states, _ = self.attn(hidden_states, position_embeddings=position_embeddings, **kwargs)
        hidden_states = self._added(self.attn_norm, hidden_states, residual)
        hidden_states, residual = self._normed(self.mlp_norm, hidden_states), hidden_states
        return self._added(self.mlp_norm, self.mlp(hidden_states), residual)

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.norm_first else x

    def _added(self, norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        x = _drop_path(nn.functional.dropout(x, self.dropout, self.training), self.drop_path, self.training)
        x = x + (residual if self.residual_scale == 1 else self.residual_scale * residual)
        return x if self.norm_first else norm(x)


def _drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (Huang et al., arXiv 1603.09382): a row is left out with probability `rate`, else scaled up."""
    if rate == 0 or not training:
        return x
    kept = torch.rand((len(x), *[1] * (x.dim() - 1)), device=x.device) >= rate
    return x * kept.to(x.dtype) / (1 - rate)
