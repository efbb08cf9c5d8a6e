"""The small MiniMax that train_from_scratch.py makes: its config, and the dropout that stock lacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MiniMaxConfig, PreTrainedTokenizerFast


def make_config(tokenizer: PreTrainedTokenizerFast, *, hidden: int, experts: int, expert_width: int) -> MiniMaxConfig:
    """Seven linear layers and one softmax layer, linear first, as in the published MiniMax models."""
    layers = 8
    # DeepNorm's factor on the residual, (2 * layers)^(1/4); the published models' 3.5566 is that of 80 layers.
    alpha = (2 * layers) ** 0.25
    return MiniMaxConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=expert_width,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64 if hidden > 64 else 16,
        num_local_experts=experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        full_attn_alpha_factor=alpha,
        linear_attn_alpha_factor=alpha,
        mlp_alpha_factor=alpha,
        block_size=64,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@contextmanager
def residual_dropout(model: Any, probability: float) -> Iterator[None]:
    """Dropout on the embeddings and on what each attention and expert block adds; stock MiniMax has none."""

    def drop(module: torch.nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], probability, module.training), *output[1:])
        return F.dropout(output, probability, module.training)

    blocks = [model.model.embed_tokens, *(b for layer in model.model.layers for b in (layer.self_attn, layer.mlp))]
    handles = [block.register_forward_hook(drop) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
