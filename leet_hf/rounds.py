"""Rounds of assisted decoding: candidates, a recorded step that checks them, and what of them is right.

Between two forwards, transformers' loop of assisted decoding launches some forty kernels and waits for the device five
times, which takes longer than the step of many a model. Rounds are therefore run here, one after another, when the loop
asks for candidates. What it gets are tokens that are right already; the forward by which it then checks them finds its
result computed, as a step that was launched ahead is (`ahead.py`). Whatever else the loop does instead, the cache is as
it was: until that forward is asked for, all tokens of the rounds are noted as taken back.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from .ahead import PASS, Pass, asked_again
from .draft import Draft, unheld
from .obstacles import MOST_TOKENS
from .upgrade import recurrent_layers
from .versions import CACHE

if TYPE_CHECKING:
    from .step import Step

_LOOP = GenerationMixin._assisted_decoding.__code__
LONGEST = 0.03  # seconds of rounds before transformers' loop sees their tokens: streams go on, and its share is small


@dataclass
class Verified:
    """Tokens that rounds have run after the first `length` ones of a cache. hidden_states: [1, tokens, hidden].

    noted: how many its layers are to take back, which are these and those of the last round that were not right.
    """

    step: Step
    cache: Any
    length: int
    hidden_states: Tensor
    noted: int

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[1]

    def is_asked_for(self, cache: Any, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether a forward of tokens ids [B, T] after a cache is that of these; then the cache has them again."""
        tokens = self.tokens
        if cache is not self.cache or ids.shape != (1, tokens) or int(cache.get_seq_length()) != self.length:
            return False
        if mask is not None and mask.shape != (1, self.length + tokens):
            return False
        return asked_again(cache, tokens, self.noted)


class Rounds:
    """What the candidate generator of one generate() call does from now on, in rounds where they are possible.

    on_host: whether the generator reads the tokens on the CPU. The generator holds it, not it the generator: the pass
    is to end with the call.
    """

    def __init__(self, generator: Any, model: Any, granted: Pass, cache: Any, *, on_host: bool) -> None:
        assert granted.bounds is not None
        self._model, self._granted, self._cache, self._on_host = model, granted, cache, on_host
        self._longest, self._ends = granted.bounds
        self._known: Tensor | None = None  # the CPU's copy of the tokens, [1, T], while they are the loop's too
        self._ran = 0  # tokens that the loop was last given as right, with the one behind them
        self._get, self._update = (unheld(generator, name) for name in ("get_candidates", "update_candidate_strategy"))
        generator.get_candidates, generator.update_candidate_strategy = self.candidates, self.update

    def candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """input_ids [1, T] to (these and n tokens that are right, [1, T + n], None), or to what the generator gives."""
        self._ran = 0
        if not kwargs and sys._getframe(1).f_code is _LOOP and self._possible(input_ids):
            new = self._run(input_ids)
            if new:
                self._ran = len(new)
                right = torch.tensor([new[:-1]], dtype=input_ids.dtype).to(input_ids.device, non_blocking=True)
                return torch.cat((input_ids, right), dim=1), None
        self._known = None
        return self._get(input_ids, **kwargs)

    def update(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """As the generator's, which has heard of every round by itself."""
        if self._ran and num_matches + 1 != self._ran:
            self._known = None
        elif not self._ran:
            self._update(input_ids, scores, num_matches)

    def _possible(self, input_ids: Tensor) -> bool:
        last, length = self._granted.last, input_ids.shape[1]
        if last is None or last[1] is not self._cache or length >= self._longest:
            return False
        return self._granted.decoding.holds(self._granted, *last) and int(self._cache.get_seq_length()) == length - 1

    @torch.no_grad()
    def _run(self, input_ids: Tensor) -> list[int]:
        """Run rounds after tokens input_ids [1, T] and note them as `Verified`: the tokens that come next, or none."""
        until = time.perf_counter() + LONGEST
        cache, start = self._cache, input_ids.shape[1]
        known, device = self._on_the_host(input_ids), input_ids.device
        new: list[int] = []
        hidden: list[Tensor] = []
        step: Step | None = None
        keep = min(0 if layer.state is None else layer.state.keep for layer in recurrent_layers(cache))
        # All of them must be there to be taken back, whatever the next round brings.
        while len(new) + MOST_TOKENS <= keep and start + len(new) < self._longest and time.perf_counter() < until:
            found = self._get(known if self._on_host else input_ids)[0]
            most = min(MOST_TOKENS, self._longest - start - len(new)) - 1
            tried = found[0, start + len(new) :][:most].tolist()
            ids = torch.tensor([[int(known[0, -1]), *tried]], dtype=input_ids.dtype)
            logits = self._logits(ids.to(device, non_blocking=True), start - 1 + len(new))
            last = self._granted.last
            if last is None:  # not by a recorded step, whose result could be given again
                cache.crop(-ids.shape[1])
                break
            chosen = logits.argmax(-1).tolist()
            right = self._agreed(tried, chosen)
            cache.crop(len(right) - ids.shape[1])
            step, seen = last[0], self._granted.hidden_states
            assert seen is not None
            hidden.append(seen[:, : len(right)])
            new += right
            more = torch.tensor([right], dtype=input_ids.dtype)
            known = torch.cat((known, more), dim=1)
            if not self._on_host:
                input_ids = torch.cat((input_ids, more.to(device, non_blocking=True)), dim=1)
            self._update(input_ids, logits[None], len(right) - 1)
            if right[-1] in self._ends:
                break
        if new:
            assert step is not None
            self._known = known
            cache.crop(-len(new))
            noted = recurrent_layers(cache)[0].taken
            self._granted.verified = Verified(step, cache, start - 1, torch.cat(hidden, dim=1), noted)
        return new

    def _agreed(self, tried: list[int], chosen: list[int]) -> list[int]:
        """The candidates that the model chose too, and the token it chose behind them; nothing after an end."""
        right: list[int] = []
        for candidate, token in zip([*tried, None], chosen, strict=True):
            right.append(token)
            if candidate != token or token in self._ends:
                break
        return right

    def _logits(self, ids: Tensor, length: int) -> Tensor:
        """Logits [T, vocabulary] of tokens ids [1, T], the first of which comes after `length` others."""
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None]
        arguments = {CACHE: self._cache, PASS: self._granted}
        return self._model(input_ids=ids, position_ids=positions, use_cache=True, **arguments).logits[0]

    def _on_the_host(self, input_ids: Tensor) -> Tensor:
        """A copy of the tokens on the CPU."""
        return input_ids.cpu() if self._known is None else self._known


def in_rounds(generator: Any, model: Any, arguments: dict[str, Any]) -> Any:
    """Let the candidate generator of a generate() call work in rounds, if that call's tokens are known to be the same.

    arguments: those that the generator was made with. Greedy decoding without logits processors, to a length or a
    token, of text from its beginning on; sampling draws random numbers in the order of transformers' loop.
    """
    own, config = arguments.get("model_kwargs", {}), arguments["generation_config"]
    granted, kind = own.get(PASS), type(generator)
    if granted is None or granted.bounds is None or kind not in (
        AssistedCandidateGenerator, PromptLookupCandidateGenerator
    ):  # fmt: skip
        return generator
    if config.do_sample or arguments.get("logits_processor") or getattr(config, "assistant_ensemble_weight", None):
        return generator
    if not plain_text(own):
        return generator
    draft = getattr(generator, "assistant_model", model)
    if draft is not model and hasattr(getattr(draft, "_leet", None), "decoding"):
        Draft(generator)
    Rounds(generator, model, granted, own[CACHE], on_host=kind is PromptLookupCandidateGenerator)
    return generator


def plain_text(arguments: dict[str, Any]) -> bool:
    """Whether arguments of a model's forward say nothing but that tokens follow each other, from position 0 on."""
    known = {CACHE, PASS, "use_cache", "logits_to_keep", "attention_mask", "position_ids"}
    if any(isinstance(value, Tensor) or value for name, value in arguments.items() if name not in known):
        return False
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        return False
    if positions is None:
        return True
    return positions.dim() == 2 and positions[0].tolist() == list(range(positions.shape[1]))
