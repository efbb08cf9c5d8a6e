"""Tiny random MiniMax models, whose greedy outputs vary and whose logits are well apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

LINEAR, SOFTMAX = "linear_attention", "full_attention"
LAYOUTS = {
    "linear-first": [LINEAR, LINEAR, LINEAR, SOFTMAX],  # as published, with 7 : 1
    "softmax-first": [SOFTMAX, LINEAR, SOFTMAX, LINEAR],
    "all-linear": [LINEAR] * 4,
}
VOCAB = 128


def config(layout: str = "linear-first", **changes: Any) -> MiniMaxConfig:
    """A tiny model's config: hidden size 64, 4 heads of 16, 4 layers, 2 of 4 experts used, stock blocks of 8 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
        "max_position_embeddings": 4096,
        "initializer_range": 0.125,  # 1 / sqrt(hidden size): neither dull nor chaotic
        "layer_types": LAYOUTS[layout],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return MiniMaxConfig(**settings | changes)


def model(layout: str = "linear-first", *, seed: int = 0, kind: type = MiniMaxForCausalLM, **changes: Any) -> Any:
    """A tiny random model of class `kind` in eval mode, float32; the same weights for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config(layout, **changes)).eval()


def prompts(lengths: tuple[int, ...] = (11, 17, 6), seed: int = 5) -> list[list[int]]:
    """Random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def rounded(layout: str = "linear-first") -> Any:
    """A tiny float32 model whose weights bfloat16 can hold. All experts are used: choosing makes rounding jump."""
    stock = model(layout, num_experts_per_tok=4)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(parameter.bfloat16())
    return stock
