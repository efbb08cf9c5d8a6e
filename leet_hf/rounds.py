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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from .ahead import PASS, Ahead, Pass
from .draft import Draft, logits_of, unheld
from .obstacles import MOST_TOKENS
from .upgrade import recurrent_layers
from .versions import CACHE

if TYPE_CHECKING:
    from .step import Step

_LOOP = GenerationMixin._assisted_decoding.__code__
LONGEST = 0.03  # seconds of rounds before transformers' loop sees their tokens: streams go on, and its share is small


class Rounds:
    """What the candidate generator of one generate() call does from now on, in rounds where they are possible.

    on_host: whether the generator reads the tokens on the CPU. The generator holds it, not it the generator: the pass
    is to end with the call.
    """

    def __init__(self, generator: Any, model: Any, granted: Pass, cache: Any, *, on_host: bool) -> None:
        assert granted.bounds is not None
        self._model, self._granted, self._cache, self._on_host = model, granted, cache, on_host
        self._longest, self._ends = granted.bounds
        self._ran = False  # whether what the loop was last given comes from rounds
        self._get, self._update = (unheld(generator, name) for name in ("get_candidates", "update_candidate_strategy"))
        generator.get_candidates, generator.update_candidate_strategy = self.candidates, self.update

    def candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """input_ids [1, T] to (these and n tokens that are right, [1, T + n], None), or to what the generator gives."""
        new = []
        if not kwargs and sys._getframe(1).f_code is _LOOP and self._possible(input_ids):
            new = self._run(input_ids)
        self._ran = bool(new)
        if not new:
            return self._get(input_ids, **kwargs)
        right = torch.tensor([new[:-1]], dtype=input_ids.dtype).to(input_ids.device, non_blocking=True)
        return torch.cat((input_ids, right), dim=1), None

    def update(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """As the generator's, which has heard of every round by itself."""
        if not self._ran:
            self._update(input_ids, scores, num_matches)

    def _possible(self, input_ids: Tensor) -> bool:
        last, length = self._granted.last, input_ids.shape[1]
        if last is None or last[1] is not self._cache or length >= self._longest:
            return False
        return self._granted.decoding.holds(self._granted, *last) and int(self._cache.get_seq_length()) == length - 1

    @torch.no_grad()
    def _run(self, input_ids: Tensor) -> list[int]:
        """Run rounds after tokens input_ids [1, T] and note them as run ahead: the tokens that come next, or none."""
        until = time.perf_counter() + LONGEST
        cache, granted = self._cache, self._granted
        text = input_ids.cpu() if self._on_host else input_ids
        new: list[int] = []
        before = int(text[0, -1])
        hidden: list[Tensor] = []
        step: Step | None = None
        keep = min(0 if layer.state is None else layer.state.keep for layer in recurrent_layers(cache))
        # All of them must be there to be taken back, whatever the next round brings.
        while len(new) + MOST_TOKENS <= keep and text.shape[1] < self._longest and time.perf_counter() < until:
            most = min(MOST_TOKENS, self._longest - text.shape[1]) - 1
            tried = self._get(text)[0][0, text.shape[1] :][:most].tolist()
            ids = torch.tensor([[before, *tried]], dtype=text.dtype).to(input_ids.device, non_blocking=True)
            logits = logits_of(self._model, ids, text.shape[1] - 1, cache, granted)
            if granted.last is None:  # not by a recorded step, whose result could be given again
                cache.crop(-ids.shape[1])
                break
            right = self._agreed(tried, logits[0].argmax(-1).tolist())
            cache.crop(len(right) - ids.shape[1])
            step, seen = granted.last[0], granted.hidden_states
            assert seen is not None
            hidden.append(seen[:, : len(right)])
            new += right
            before = right[-1]
            text = torch.cat((text, torch.tensor([right], dtype=text.dtype).to(text.device, non_blocking=True)), dim=1)
            self._update(text, logits, len(right) - 1)
            if before in self._ends:
                break
        if new:
            assert step is not None
            cache.crop(-len(new))
            noted = recurrent_layers(cache)[0].taken
            granted.ahead = Ahead(step, cache, input_ids.shape[1] - 1, torch.cat(hidden, dim=1), noted)
        return new

    def _agreed(self, tried: list[int], chosen: list[int]) -> list[int]:
        """The candidates that the model chose too, and the token it chose behind them; nothing after an end."""
        right: list[int] = []
        for candidate, token in zip([*tried, None], chosen, strict=True):
            right.append(token)
            if candidate != token or token in self._ends:
                break
        return right


def in_rounds(generator: Any, model: Any, arguments: dict[str, Any]) -> None:
    """Let the candidate generator of a generate() call work in rounds, if that call's tokens are known to be the same.

    arguments: those that the generator was made with. Greedy decoding without logits processors, to a length or a
    token, of text from its beginning on; sampling draws random numbers in the order of transformers' loop.
    """
    own, config = arguments.get("model_kwargs", {}), arguments["generation_config"]
    granted, kind = own.get(PASS), type(generator)
    if kind not in (AssistedCandidateGenerator, PromptLookupCandidateGenerator):
        return
    if granted is None or granted.bounds is None or config.do_sample or not plain_text(own):
        return
    if arguments.get("logits_processor") or getattr(config, "assistant_ensemble_weight", None):
        return
    draft = getattr(generator, "assistant_model", model)
    if draft is not model and hasattr(getattr(draft, "_leet", None), "decoding"):
        Draft(generator, granted.bounds[1])
    Rounds(generator, model, granted, own[CACHE], on_host=kind is PromptLookupCandidateGenerator)


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
