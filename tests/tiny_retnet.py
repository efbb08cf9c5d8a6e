"""Tiny random RetNets of every published kind, whose greedy outputs vary and whose logits are well apart."""

from __future__ import annotations

from typing import Any

import torch

from leet_hf.retnet import RetNetConfig, RetNetForCausalLM

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.125,  # 1 / sqrt(hidden size): neither dull nor chaotic
    "bos_token_id": None,
    "eos_token_id": None,
}
TORCHSCALE: dict[str, Any] = {
    "position_embedding": "theta_shift",
    "hidden_act": "gelu",
    "gate_act": "swish",
    "elementwise_affine": False,
    "retention_scale": "score",
    "scale_embeddings": True,
    "norm_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "fla": {},
    "torchscale": TORCHSCALE,
    "port": TORCHSCALE | {
        "decay": "retnet_language_model", "mlp_type": "ffn", "mlp_bias": True, "subln": True,
    },
    "deepnorm": TORCHSCALE | {"deepnorm": True, "retention_scale": "decay", "initializer_range": 0.25},
    "grouped": {
        "num_kv_heads": 2, "expand_k": 0.5, "expand_v": 1.5, "norm_type": "layernorm", "head_norm_type": "layernorm",
        "attention_bias": True, "feature_map": "relu", "fuse_norm": False,
    },
    "hybrid": {"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}},
}  # fmt: skip


def config(kind: str = "fla", **changes: Any) -> RetNetConfig:
    """The config of a tiny RetNet: hidden size 64, 4 heads, 4 layers."""
    return RetNetConfig(**SIZES | KINDS[kind] | changes)


def model(kind: str = "fla", *, seed: int = 1, cls: type = RetNetForCausalLM, **changes: Any) -> Any:
    """A tiny random model in eval mode, float32; norms and biases random too. The same for the same arguments.

    With seed 1, for the prompts of `tiny`, greedy outputs vary and logits are well apart in every kind.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = cls(config(kind, **changes)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return made
