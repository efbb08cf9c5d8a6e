"""The CPU form of the forward, chunk after chunk, against the oracle: lanes of heads, shared heads, short tails."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from leet_linear_attention import linear_attention, reference, torch_chunked, torch_rows
from operator_cases import Case, assert_close, error, make_inputs, run_oracle

WIDE = Case(tokens=321, key_dim=64, value_dim=96, heads=(4, 4, 4, 4), scale=0.3)
CASES = [
    WIDE,
    dataclasses.replace(WIDE, decay="none", initial=False, tokens=129),
    dataclasses.replace(WIDE, decay="head", tokens=384, dtype=torch.bfloat16),
    dataclasses.replace(WIDE, decay="reset", heads=(8, 2, 4, 1), dtype=torch.float16),
    # 256 x 200 numbers a state: one head at a time, whose keys and values are those of several
    dataclasses.replace(WIDE, decay="head", key_dim=256, value_dim=200, heads=(2, 1, 4, 4), batch=1),
    dataclasses.replace(WIDE, decay="token", key_dim=130, value_dim=140, heads=(6, 3, 2, 3), initial=False),
    dataclasses.replace(WIDE, decay="head", heads=(1, 1, 4, 2), dtype=torch.float64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case: Case) -> None:
    x = make_inputs(case, "cpu")
    heads = max(case.heads)
    assert case.tokens > torch_chunked.ONE_BLOCK and torch_rows.serves(x.q, x.v, heads, None)
    assert_close(x, "torch", run_oracle(x))


def test_a_state_that_is_given_stays_as_it_was() -> None:
    x = make_inputs(dataclasses.replace(WIDE, initial=True), "cpu")
    assert x.initial_state is not None
    before = x.initial_state.clone()
    _, final = linear_attention(x.q, x.k, x.v, x.log_decay, initial_state=x.initial_state, output_final_state=True)
    assert torch.equal(x.initial_state, before)
    assert final is not None and final.data_ptr() != x.initial_state.data_ptr()


def test_factors_applied_at_every_chunk_do_not_drift() -> None:
    tokens = 6000
    x = make_inputs(Case(tokens, 64, 64, heads=(4, 4, 4, 4), decay="none", batch=1), "cpu")
    assert x.initial_state is not None
    x.initial_state *= 100  # what is left of it shows the product of all factors
    g = torch.tensor([-3e-4, -1.1e-3, -7e-4, -1e-5])
    o, final = linear_attention(x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True)
    wanted, wanted_final = reference.recurrent(x.q, x.k, x.v, g, initial_state=x.initial_state, output_final_state=True)
    assert final is not None and wanted_final is not None
    assert max(error(o, wanted), error(final, wanted_final)) < 2e-6
