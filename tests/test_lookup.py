"""Prompt lookup on the host's copy of the tokens: the candidates of transformers' own, and what is left as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import tiny
from leet_hf import lookup, patch_model
from leet_hf.lookup import searching_on_the_host


def generator(eos: int | None = None, processors: Any = (), **options: Any) -> PromptLookupCandidateGenerator:
    return PromptLookupCandidateGenerator(
        eos_token_id=None if eos is None else torch.tensor([eos]),
        logits_processor=LogitsProcessorList(processors),
        vocab_size=8,
        **{"num_output_tokens": 4, "max_matching_ngram_size": 2, "max_length": 60} | options,
    )


@pytest.mark.parametrize(
    "options", [{}, {"eos": 3}, {"num_output_tokens": 1}, {"max_length": 41}, {"max_matching_ngram_size": 4}], ids=str
)
def test_candidates_are_those_of_transformers(options: dict[str, Any]) -> None:
    """Over texts that grow by one token or several, as in one generate() call."""
    numbers = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(20):
        want_of, got_of = generator(**options), searching_on_the_host(generator(**options))
        ids = torch.randint(8, (1, 5), generator=numbers)
        while ids.shape[1] < 40:
            want, got = want_of.get_candidates(ids), got_of.get_candidates(ids)
            assert torch.equal(want[0], got[0]) and want[1] is got[1] is None
            found += want[0].shape[1] > ids.shape[1]
            ids = torch.cat((ids, torch.randint(8, (1, 1 + found % 3), generator=numbers)), dim=1)
    assert found > 50


def test_a_text_that_got_shorter_is_another_one() -> None:
    one = searching_on_the_host(generator())
    one.get_candidates(torch.arange(8)[None])
    ids = torch.tensor([[1, 2, 3, 1, 2]])
    assert one.get_candidates(ids)[0].tolist() == [[1, 2, 3, 1, 2, 3, 1, 2]]


def test_logits_processors_are_asked_as_before() -> None:
    """They may hold tensors of the device, and may forbid candidates."""
    one = generator(processors=[RepetitionPenaltyLogitsProcessor(2.0)])
    before = one.get_candidates
    assert searching_on_the_host(one).get_candidates == before and len(one.logits_processor) == 1


def test_places_within_a_token_are_none() -> None:
    """Tokens are searched as bytes: 1 stands in [256, 0] one byte behind the beginning, if they are little endian."""
    one = searching_on_the_host(generator(max_matching_ngram_size=1))
    ids = torch.tensor([[256, 0, 5, 1 << 40, 1, 7, 1]])
    assert one.get_candidates(ids)[0].tolist() == [[*ids[0].tolist(), 7, 1]]


def test_generate_searches_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny.model(), method="torch")
    ids = torch.tensor([[5, 6, 7, 8, 9] * 4])
    seen: list[int] = []
    search = lookup._Search.__call__

    def watched(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(input_ids.shape[1])
        return search(self, input_ids, **kwargs)

    monkeypatch.setattr(lookup._Search, "__call__", watched)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    got = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(got, model.generate(ids, **options)) and seen[0] == 20 and seen == sorted(seen)
