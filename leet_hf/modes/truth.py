"""The truth a mode is compared with: forwards of the stock model that keep no cache, one row alone, no padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

Prompts = list[list[int]]


class Truth:
    """Cache-free answers of a stock model: slow and obviously right. Answers are kept, as many modes share them.

    model: the stock model in float32, in eval mode. prompts: token ids, at least three rows of at least six tokens and
    of different lengths, so that padding, packing and reordering have something to get wrong.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        if len(prompts) < 3 or min(map(len, prompts)) < 6 or len(set(map(len, prompts))) < 2:
            raise ValueError(
                f"prompts has rows of {[len(row) for row in prompts]} tokens; give at least three rows of at least six "
                "tokens, not all of the same length"
            )
        if model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        self.model = model
        self.prompts = prompts
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}
        self._kept: dict[Callable[..., Any], Any] = {}

    def forward(self, tokens: list[int], **options: Any) -> Any:
        """The stock model's output object for one row alone, without a cache."""
        ids = torch.tensor([tokens], device=self.model.device)
        with torch.no_grad():
            return self.model(input_ids=ids, use_cache=False, **options)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits of one row, float32 [len(tokens), vocab] on the CPU."""
        key = tuple(tokens)
        if key not in self._logits:
            self._logits[key] = self.forward(tokens).logits[0].float().cpu()
        return self._logits[key]

    def greedy(self, tokens: list[int], new: int) -> list[int]:
        """The row continued by `new` tokens, each the argmax of a forward over everything before it."""
        tokens = list(tokens)
        for _ in range(new):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens

    def changed(self, change: Callable[[Any], Any]) -> Truth:
        """The truth of a changed copy of the model, with the same prompts."""
        return self._once(change, lambda: Truth(change(copy.deepcopy(self.model)), self.prompts))

    def expected(self, expect: Callable[[Truth], Any]) -> Any:
        """What `expect` makes of this truth, worked out once however many models are compared with it."""
        return self._once(expect, lambda: expect(self))

    def _once(self, key: Callable[..., Any], make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """RMS of the difference / RMS of `want`, in float64; inf where shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    want = want.detach().double().cpu()
    scale = want.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return ((got.detach().double().cpu() - want).square().mean().sqrt() / scale).item()
