"""Experts of a mixture for the few tokens of a decode step: two launches, which read each chosen expert once.

The host's "grouped_mm" sorts tokens by experts first: some twenty launches, which in a decode step take longer than
reading the weights. Registered with Transformers as the experts implementation `NAME`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from leet_linear_attention.dispatch import available_methods

from .expert_form import has_default_gate, is_plain
from .glu import activation_name

NAME = "leet_hf"
MOST_TOKENS = 64  # all of them are in every program's tile


def misfit(experts: nn.Module, tokens: int) -> str | None:
    """Why these kernels can not be a module's experts for `tokens` tokens, or None if they can."""
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens are more than {MOST_TOKENS}"
    given: Any = experts
    if not is_plain(experts) or not given.is_concatenated:
        return "the experts have another form than a gate, up and down projection without bias"
    if not has_default_gate(experts) or activation_name(given.act_fn) != "silu":
        return "the experts' gate is another than silu(gate) * up"
    if not (given.gate_up_proj.is_contiguous() and given.down_proj.is_contiguous()):
        return "the experts' weights are not contiguous"
    if not given.down_proj.is_cuda:
        return "the experts are not on a CUDA device"
    return available_methods(given.down_proj.device, given.down_proj.dtype)["triton"]


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The sum of each token's experts, as the host's implementations compute it: no gradients.

    hidden_states [T, hidden], T at most `MOST_TOKENS`; top_k_index and top_k_weights [T, top k]. Returns [T, hidden].
    """
    from leet_linear_attention.triton.launcher import device_index

    from .experts_kernel import down, up  # imports triton

    x = hidden_states.contiguous()
    index, share = top_k_index.contiguous(), top_k_weights.contiguous()
    into_up: Tensor = self.gate_up_proj  # type: ignore[assignment]
    into_down: Tensor = self.down_proj  # type: ignore[assignment]
    tokens, chosen = index.shape
    experts, hidden, inner = into_down.shape
    rows = max(16, 1 << (tokens - 1).bit_length())
    between = x.new_empty(tokens, chosen, inner)
    out = torch.empty_like(x)
    device = device_index(x)
    narrow = x.element_size() == 2
    tile, step = 32, 128 if narrow else 32
    up(
        (experts * -(-inner // tile),), device, (x, index, into_up, between), (tokens,),
        (hidden, inner, chosen, rows, tile, step), 4, 4 if narrow else 2,
    )  # fmt: skip
    tile, step = 16, 256 if narrow else 64
    down(
        (-(-hidden // tile),), device, (between, index, share, into_down, out), (tokens, experts),
        (hidden, inner, chosen, rows, tile, step), 4, 4 if narrow else 2,
    )  # fmt: skip
    return out


def register() -> None:
    """Make the name known to Transformers, as attention and experts implementations are."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
