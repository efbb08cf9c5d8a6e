"""RetNet as torchscale and its Hugging Face port have it, in plain PyTorch: quadratic in time, no cache, no kernels.

Written from the definition in Sun et al., "Retentive Network" (arXiv 2307.08621), and from the modules, names and
options of the package torchscale 0.3.0 (`torchscale.architecture.retnet`) and of its port (repository syncdoth/RetNet),
which adds `use_lm_decay`, and with `use_glu=False` a feed-forward network with biases and, where sub-LN is on, a norm
inside it. Parameters and buffers have the names they have there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"swish": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass
class Options:
    """torchscale's names; the last block is the port's. As there, deepnorm and sub-LN settle where the norms are."""

    decoder_embed_dim: int = 32
    decoder_value_embed_dim: int = 48
    decoder_retention_heads: int = 4
    decoder_ffn_embed_dim: int = 40
    decoder_layers: int = 3
    decoder_normalize_before: bool = True
    activation_fn: str = "gelu"
    no_scale_embedding: bool = True
    layernorm_embedding: bool = False
    deepnorm: bool = False
    subln: bool = True
    share_decoder_input_output_embed: bool = False
    layernorm_eps: float = 1e-6
    vocab_size: int = 64

    use_lm_decay: bool = False
    use_glu: bool = True
    use_ffn_rms_norm: bool = False

    def __post_init__(self) -> None:
        if self.deepnorm:
            self.decoder_normalize_before = self.subln = False
        if self.subln:
            self.decoder_normalize_before, self.deepnorm = True, False


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if self.weight is None else x * self.weight


class RetNetRelPos(nn.Module):
    """`angle` [K], each twice, for the rotation of pairs; `decay` [H], the logarithm of gamma."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        heads, dim = o.decoder_retention_heads, o.decoder_embed_dim // o.decoder_retention_heads
        self.register_buffer("angle", (1e4 ** -torch.linspace(0, 1, dim // 2)).repeat_interleave(2))
        if o.use_lm_decay:
            away = torch.exp(torch.linspace(torch.tensor(1 / 32).log(), torch.tensor(1 / 512).log(), heads))
        else:
            away = 2.0 ** (-5 - torch.arange(heads))
        self.register_buffer("decay", torch.log(1 - away))


class MultiScaleRetention(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.heads, key_dim, value_dim = o.decoder_retention_heads, o.decoder_embed_dim, o.decoder_value_embed_dim
        self.q_proj = nn.Linear(key_dim, key_dim, bias=False)
        self.k_proj = nn.Linear(key_dim, key_dim, bias=False)
        self.v_proj = nn.Linear(key_dim, value_dim, bias=False)
        self.g_proj = nn.Linear(key_dim, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, key_dim, bias=False)
        self.group_norm = RMSNorm(value_dim // self.heads, o.layernorm_eps, elementwise_affine=False)

    def forward(self, x: Tensor, position: RetNetRelPos) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, position.angle), rotate(k * k.shape[-1] ** -0.5, position.angle)
        time = torch.arange(x.shape[1])
        age = (time[:, None] - time).clamp(min=0)
        decay = torch.exp(position.decay[:, None, None] * age) * (time[:, None] >= time)  # [H, T, T]
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
        scores = torch.einsum("bthk,bshk->bhts", q, k) * decay
        scores = scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1)
        o = self.group_norm(torch.einsum("bhts,bshv->bthv", scores, v))
        return self.out_proj(F.silu(self.g_proj(x)) * o.flatten(-2))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate every pair of neighbours in x [B, T, H, K] by time times the pair's angle."""
    turn = torch.arange(x.shape[1])[:, None, None] * angle
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * turn.cos() + torch.stack((-odd, even), dim=-1).flatten(-2) * turn.sin()


class GLU(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[o.activation_fn]
        self.fc1 = nn.Linear(o.decoder_embed_dim, o.decoder_ffn_embed_dim, bias=False)
        self.fc2 = nn.Linear(o.decoder_ffn_embed_dim, o.decoder_embed_dim, bias=False)
        self.gate = nn.Linear(o.decoder_embed_dim, o.decoder_ffn_embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)) * self.gate(x))


class FeedForwardNetwork(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[o.activation_fn]
        self.fc1 = nn.Linear(o.decoder_embed_dim, o.decoder_ffn_embed_dim)
        self.fc2 = nn.Linear(o.decoder_ffn_embed_dim, o.decoder_embed_dim)
        norm = RMSNorm if o.use_ffn_rms_norm else nn.LayerNorm
        self.ffn_layernorm = norm(o.decoder_ffn_embed_dim, eps=o.layernorm_eps) if o.subln else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(self.activation(self.fc1(x))))


class DecoderLayer(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.before = o.decoder_normalize_before
        self.alpha = (2.0 * o.decoder_layers) ** 0.25 if o.deepnorm else 1.0
        self.retention = MultiScaleRetention(o)
        self.retention_layer_norm = RMSNorm(o.decoder_embed_dim, o.layernorm_eps)
        self.ffn = (GLU if o.use_glu else FeedForwardNetwork)(o)
        self.final_layer_norm = RMSNorm(o.decoder_embed_dim, o.layernorm_eps)

    def forward(self, x: Tensor, position: RetNetRelPos) -> Tensor:
        x = self.around(x, self.retention_layer_norm, lambda y: self.retention(y, position))
        return self.around(x, self.final_layer_norm, self.ffn)

    def around(self, x: Tensor, norm: nn.Module, part: Any) -> Tensor:
        return self.alpha * x + part(norm(x)) if self.before else norm(self.alpha * x + part(x))


class RetNetDecoder(nn.Module):
    """torchscale's: tokens [B, T] -> logits [B, T, vocabulary]. Without an output layer, the features."""

    def __init__(self, o: Options, output_layer: bool = True) -> None:
        super().__init__()
        self.embed_scale = 1.0 if o.no_scale_embedding else o.decoder_embed_dim**0.5
        self.embed_tokens = nn.Embedding(o.vocab_size, o.decoder_embed_dim)
        if output_layer:
            self.output_projection = nn.Linear(o.decoder_embed_dim, o.vocab_size, bias=False)
            if o.share_decoder_input_output_embed:
                self.output_projection.weight = self.embed_tokens.weight
        self.has_output = output_layer
        norm = RMSNorm(o.decoder_embed_dim, o.layernorm_eps)
        self.layernorm_embedding = norm if o.layernorm_embedding else nn.Identity()
        self.layers = nn.ModuleList([DecoderLayer(o) for _ in range(o.decoder_layers)])
        norm = RMSNorm(o.decoder_embed_dim, o.layernorm_eps)
        self.layer_norm = norm if o.decoder_normalize_before else nn.Identity()
        self.retnet_rel_pos = RetNetRelPos(o)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layernorm_embedding(self.embed_scale * self.embed_tokens(tokens))
        for layer in self.layers:
            x = layer(x, self.retnet_rel_pos)
        x = self.layer_norm(x)
        return self.output_projection(x) if self.has_output else x


class PortForCausalLM(nn.Module):
    """The port's `RetNetForCausalLM`: the same decoder as `model`, and `lm_head`."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.model = RetNetDecoder(o, output_layer=False)
        self.lm_head = nn.Linear(o.decoder_embed_dim, o.vocab_size, bias=False)
        if o.share_decoder_input_output_embed:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with weights whose outputs vary and whose norms and biases are not the identity; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.eval()


def greedy(model: Any, tokens: Tensor, count: int) -> Tensor:
    """`count` tokens after `tokens` [B, T] by the highest logit, each from a forward over all before it."""
    with torch.no_grad():
        for _ in range(count):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens
