"""Teach `patch_model` a family of models it does not know: the model, and an adapter for it of thirty lines.

    python examples/register_adapter.py

The model is made up. Its linear attention is right and slow: every token looks at all before it, and there is no
state, so that it can not even keep a cache. With the adapter, `patch_model` gives it the operator, a state in
Transformers' own caches, exact padding and packing, and every decoding mode of generate().
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from leet_hf import patch_model, patch_report, register_adapter
from leet_hf.adapters import Adapter, Decay, Projected, RecurrentShape
from leet_hf.adapters.common import lacks
from leet_hf.host import decoder_forward

# What somebody else wrote.


class EchoAttention(nn.Module):
    """o_t = sum over s <= t of gamma^(t - s) (q_t . k_s) v_s / sqrt(D), by the matrix of all pairs."""

    gamma: Tensor

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("gamma", 1 - 0.5 ** torch.arange(2.0, 2 + self.heads))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2).chunk(3, -1)
        time = torch.arange(q.shape[2])
        weights = self.gamma[:, None, None] ** (time[:, None] - time).clamp(min=0) * (time[:, None] >= time)
        o = (q @ k.mT * weights) @ v * self.head_dim**-0.5
        return self.out(o.transpose(1, 2).flatten(-2)), None


class EchoModel(LlamaModel):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.self_attn = EchoAttention(config, i)


class EchoForCausalLM(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = EchoModel(config)


# What leet_hf has to know about it. Classes are known by name: their code need not be imported.


class EchoAdapter(Adapter):
    name = "echo"
    layer_class, base_class = "EchoAttention", "EchoModel"
    decay_formula = "log(1 - 2^(-2-h))"
    base_forward = staticmethod(decoder_forward)  # a base model in the way of Transformers; else write its forward

    def misfit(self, layer: Any) -> str | None:
        return lacks(layer, ["qkv", "out", "gamma", "heads", "head_dim", "layer_idx"])

    def base_misfit(self, base: Any) -> str | None:
        return lacks(base, ["embed_tokens", "layers", "norm", "rotary_emb", "config"])

    def index(self, layer: Any) -> int:
        return layer.layer_idx

    def shape(self, attention: Any) -> RecurrentShape:
        return RecurrentShape(attention.heads, attention.heads, attention.heads, attention.head_dim, attention.head_dim)

    def decay(self, layer: Any) -> Decay:
        return Decay(tuple(layer.gamma.double().log().tolist()), "buffer gamma")

    def scale(self, layer: Any) -> float:
        return layer.head_dim**-0.5

    def project(self, layer: Any, hidden_states: Tensor, position_embeddings: Any) -> Projected:
        return Projected(*layer.qkv(hidden_states).unflatten(-1, (layer.heads, -1)).chunk(3, -1))

    def finish(self, layer: Any, o: Tensor, hidden_states: Tensor, rest: Any) -> Tensor:
        return layer.out(o.flatten(-2))


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config.layer_types = ["linear_attention"] * 2
    stock = EchoForCausalLM(config).eval()

    register_adapter(EchoAdapter())
    model = patch_model(copy.deepcopy(stock))
    print(patch_report(model), "\n")

    prompts = torch.tensor([[0, 0, 0, 5, 9, 2, 7], [11, 3, 8, 1, 30, 6, 4]])  # the first row has three pads
    written = model.generate(prompts, attention_mask=(prompts != 0).long(), max_new_tokens=8, do_sample=False)
    truth = stock.generate(prompts[:1, 3:], max_new_tokens=8, do_sample=False, use_cache=False)
    print("written by the patched model, in a padded batch:", written[0, 7:].tolist())
    print("by the stock model, alone and without a cache:  ", truth[0, 4:].tolist())
    assert written[0, 7:].equal(truth[0, 4:])


if __name__ == "__main__":
    main()
