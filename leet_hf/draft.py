"""Drafts of a patched model: token after token by recorded steps, without a generate() call for each draft.

Such a call takes milliseconds for what it prepares, longer than the few tokens of a draft.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ahead import PASS, Pass
from .obstacles import MOST_TOKENS
from .versions import CACHE


def unheld(generator: Any, name: str) -> Callable[..., Any]:
    """A method of a candidate generator, its own or its class's, by something that does not hold the generator."""
    own: Callable[..., Any] | None = generator.__dict__.get(name)
    if own is not None:
        return own
    function, here = getattr(type(generator), name), weakref.ref(generator)
    return lambda *args, **kwargs: function(here(), *args, **kwargs)


def logits_of(model: Any, ids: Tensor, length: int, cache: Any, granted: Pass, last: bool = False) -> Tensor:
    """Logits [B, T, vocabulary] of tokens ids [B, T], which come after `length` others; last: of the last one alone."""
    positions = torch.arange(length, length + ids.shape[1], device=ids.device)[None]
    arguments = {CACHE: cache, PASS: granted, "logits_to_keep": int(last)}
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=True, **arguments).logits
    return logits


class Draft:
    """Writes the candidates of one AssistedCandidateGenerator, greedily; the first draft is still generate()'s.

    It stops where generate() would: at as many tokens, at one that ends a text, and after one that the draft model
    gives less than the `assistant_confidence_threshold`. The generator holds it, not it the generator: its pass is to
    end with the call. ends: tokens that end a text.
    """

    def __init__(self, generator: Any, ends: frozenset[int]) -> None:
        self._generator, self._model = weakref.ref(generator), generator.assistant_model
        self._whole = unheld(generator, "_generate_candidates")
        generator._generate_candidates = self.candidates
        self._granted: Pass | None = None
        self._cache: Any = None
        self._ends = ends

    @torch.no_grad()
    def candidates(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """(tokens [1, T] and candidates after them [1, T + n], logits or None) for arguments of generate()."""
        generator: Any = self._generator()
        ids, most = arguments[generator.input_ids_key], min(arguments["max_new_tokens"], MOST_TOKENS - 1)
        cache, mask = (generator.assistant_kwargs.get(name) for name in (CACHE, "attention_mask"))
        length = 0 if cache is None else int(cache.get_seq_length())
        new = ids[:, length:]
        few = length and 1 <= new.shape[1] <= MOST_TOKENS
        if not few or arguments["min_new_tokens"] or not self._admitted(cache, mask):
            return self._whole(arguments)
        threshold = float(generator.generation_config.assistant_confidence_threshold or 0)
        drafted: list[Tensor] = []
        sure: list[float] = []
        logits = self._logits(new, length)
        length += new.shape[1]
        for place in range(most):
            best = logits.float().softmax(-1).max(-1)
            drafted.append(best.indices[:, None])
            if place + 1 < most:  # before the host waits: if it is not wanted, the next crop takes it back
                logits = self._logits(drafted[-1], length)
                length += 1
            sure.append(best.values.item())
            if sure[-1] < threshold or (self._ends and best.indices.item() in self._ends):
                break
        if hasattr(generator, "probs"):
            generator.probs.extend(sure)  # from which transformers learns a better threshold
        return torch.cat((ids, *drafted), dim=1), None

    def _admitted(self, cache: Any, mask: Any) -> bool:
        """Whether the draft model has recorded steps for its cache."""
        if self._granted is None or self._cache is not cache:
            self._cache = cache
            self._granted = self._model._leet.decoding.admit(self._model, self._model.base_model, cache, mask)
        return self._granted is not None

    def _logits(self, ids: Tensor, length: int) -> Tensor:
        """Logits [1, vocabulary] behind the last of tokens ids [1, T], which come after `length` others."""
        assert self._granted is not None
        return logits_of(self._model, ids, length, self._cache, self._granted, last=True)[:, -1]
