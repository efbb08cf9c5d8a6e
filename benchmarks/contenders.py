"""Who is compared in `methods.py`: the methods of `linear_attention`, and LeetDecoding's where it can be imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from leet_linear_attention import available_methods, linear_attention

# LeetDecoding: attn_method -> module, function, whether it takes the decay itself (else its rate).
PEERS = {
    "vanilla": ("linear_attn", "linear_attn", False),
    "lightningAttention2": ("lightningAttention2", "lightning_attn2", False),
    "lightningAttention2_torch": ("lightningAttention2_torch", "lightningAttention2_torch", False),
    "FleetAttention": ("FleetAttention_triton", "FleetAttention_triton", True),
    "FleetAttention_torch": ("FleetAttention", "FleetAttention", True),
    "causal_dot_product": ("causal_dot_product", "causal_dot_product", True),
    "causal_dot_product_torch": ("causal_dot_product_torch", "causal_dot_product_torch", True),
    "recursion": ("Recursion", "recursion", False),
    "block-based": ("BlockBased", "blockBased", False),
}


@dataclass(frozen=True)
class Plan:
    """What is measured: lengths, state heads, head dim, dtype; seconds a call and all of it may take."""

    device: str
    lengths: list[int]
    heads: int
    width: int
    dtype: torch.dtype
    call_seconds: float
    seconds: float


@dataclass
class Contender:
    """A method, the default first: its call for q, k, v `[B, T, H, D]` and rates `[H]`, or why there is none.

    quadratic: its time grows with the square of T.
    """

    name: str
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None
    missing: str = ""
    quadratic: bool = False
    last: tuple[int, float] | None = None  # the longest length that was timed, and its seconds

    def seconds(self, tokens: int) -> float:
        """What a call of `tokens` tokens will take, from the length before; 0 where nothing is known."""
        if self.last is None:
            return 0.0
        return self.last[1] * (tokens / self.last[0]) ** (2 if self.quadratic else 1)

    def memory(self, tokens: int, plan: Plan) -> int:
        """Bytes of scores, the one thing here that grows faster than the inputs: with their mask, and their product."""
        return 3 * 4 * plan.heads * tokens**2 if self.quadratic else 0


def contenders(plan: Plan, peers: bool) -> list[Contender]:
    refusals = available_methods(plan.device, plan.dtype)
    default = next(name for name, why in refusals.items() if why is None)  # they come in the order of "auto"
    order = [default, *[name for name in refusals if name != default]]

    def ours(name: str) -> Contender:
        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
            return linear_attention(q, k, v, -rate, method=name)[0]

        refusal = refusals.get(name) or ""
        label = f"{name} (auto)" if name == default else name
        return Contender(label, None if refusal else call, refusal, quadratic=name == "vanilla")

    return [ours(name) for name in order] + ([peer(name) for name in PEERS] if peers else [])


def peer(name: str) -> Contender:
    """A method of LeetDecoding, by itself: several need a compiler or an old GPU to be imported at all."""
    module, function, takes_decay = PEERS[name]
    label = f"LeetDecoding {name}"
    try:
        theirs = getattr(importlib.import_module(f"leetDecoding.methods.{module}"), function)
    except ModuleNotFoundError as error:
        return Contender(label, None, f"{error.name} is not installed")
    except Exception as error:  # whatever its import runs into: it compiles, and looks its GPU up in a list
        return Contender(label, None, f"its import raised {type(error).__name__}")

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return theirs(*heads_first, (-rate).exp() if takes_decay else rate).transpose(1, 2)

    return Contender(label, call, quadratic=name == "vanilla")
