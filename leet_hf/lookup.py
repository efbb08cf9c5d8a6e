"""Prompt lookup on the host: transformers' search for candidates reads numbers one by one, and each waits for a GPU."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator


def searching_on_the_host(generator: Any) -> Any:
    """Let the candidate generator of one generate() call, if it looks up candidates, do so in a copy on the CPU.

    It finds the same candidates. With logits processors, which may forbid some, it is left as it is.
    """
    if type(generator) is PromptLookupCandidateGenerator and not generator.logits_processor:
        generator.get_candidates = _Search(generator)  # type: ignore[assignment, method-assign]
    return generator


class _Search:
    """`get_candidates` on the CPU's copy of the tokens, which grow from call to call: only new ones are copied."""

    def __init__(self, generator: PromptLookupCandidateGenerator) -> None:
        self._most, self._longest = generator.num_output_tokens, generator.max_length
        self._widest = generator.max_matching_ngram_size
        ends = generator.eos_token_id
        self._ends = frozenset(() if ends is None else ends.flatten().tolist())
        self._tokens = array("q")
        self._bytes = bytearray()  # of the same tokens: searched at the speed of memory

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """input_ids [1, T] to (these and candidates, [1, T + n] on the same device, None)."""
        if len(self._tokens) > input_ids.shape[1]:  # not the tokens that were copied
            del self._tokens[:], self._bytes[:]
        new = array("q", input_ids[0, len(self._tokens) :].tolist())
        self._tokens += new
        self._bytes += new.tobytes()
        found = self._found()
        if not found:
            return input_ids, None
        # The CPU's memory is read before this returns, but nothing waits for the GPU.
        candidates = torch.tensor([found], dtype=input_ids.dtype).to(input_ids.device, non_blocking=True)
        return torch.cat((input_ids, candidates), dim=1), None

    def _found(self) -> list[int]:
        """What follows the first place where the last tokens, as many as possible, stand; up to a token that ends."""
        tokens = len(self._tokens)
        if self._longest == tokens + 1:
            return []
        for width in range(min(self._widest, tokens - 1), 0, -1):
            begin = self._first(width) + width
            found = self._tokens[begin : min(begin + self._most, self._longest)].tolist()
            if found:
                return found[: next((i for i, token in enumerate(found) if token in self._ends), None)]
        return []

    def _first(self, width: int) -> int:
        """Where the last `width` tokens stand first; where they end the text if nowhere else."""
        size = self._tokens.itemsize
        wanted = self._bytes[-width * size :]
        at = self._bytes.find(wanted)
        while at % size:  # within a token
            at = self._bytes.find(wanted, at + 1)
        return at // size
