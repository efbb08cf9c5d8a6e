"""Prompt lookup on the host: transformers' search for candidates reads numbers one by one, and each waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


def searching_on_the_host(generator: Any) -> Any:
    """Let the candidate generator of one generate() call, if it looks up candidates, do so in a copy on the CPU.

    It finds the same candidates. Logits processors may hold tensors of the device: with any, it is left as it is.
    """
    if type(generator) is PromptLookupCandidateGenerator and not generator.logits_processor:
        generator.logits_processor = None  # else every candidate is asked about, though none can be forbidden
        if generator.eos_token_id is not None:
            generator.eos_token_id = generator.eos_token_id.cpu()
        generator.get_candidates = _Search(generator.get_candidates)  # type: ignore[assignment, method-assign]
    return generator


class _Search:
    """`get_candidates` on the CPU's copy of the tokens, which grow from call to call: only new ones are copied."""

    def __init__(self, search: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
        self._search = search
        self._copy: Tensor | None = None

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """input_ids [1, T] to (these and candidates, [1, T + n] on the same device, None)."""
        tokens = input_ids.shape[1]
        copied = 0 if self._copy is None else self._copy.shape[1]
        if copied > tokens:  # not the tokens that were copied
            self._copy, copied = None, 0
        new = input_ids[:, copied:].cpu()
        self._copy = new if self._copy is None else torch.cat((self._copy, new), dim=1)
        found, logits = self._search(self._copy, **kwargs)
        if found.shape[1] == tokens:
            return input_ids, logits
        # The CPU's memory is read before this returns, but nothing waits for the GPU.
        candidates = found[:, tokens:].to(input_ids.device, non_blocking=True)
        return torch.cat((input_ids, candidates), dim=1), logits
