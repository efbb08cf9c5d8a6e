"""The oracle's two forms agree with each other and with numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from leet_linear_attention import reference
from operator_cases import Case, error, make_inputs, run_oracle

FORMS = [reference.recurrent, reference.quadratic]


@pytest.mark.parametrize("form", FORMS)
def test_by_hand(form) -> None:
    q, k, v = (torch.tensor(x).view(1, 2, 1, 1) for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    log_decay = torch.tensor([math.log(0.25), math.log(0.5)], dtype=torch.float64).view(1, 2, 1)
    state = torch.tensor(4.0).view(1, 1, 1, 1)
    o, final = form(q, k, v, log_decay, scale=0.1, initial_state=state, output_final_state=True)
    first = 0.25 * 4 + 5 * 11
    second = 0.5 * first + 7 * 13
    assert o.flatten().tolist() == pytest.approx([0.2 * first, 0.3 * second])
    assert final.item() == pytest.approx(second)


@pytest.mark.parametrize("form", FORMS)
def test_no_final_state_unless_asked(form) -> None:
    x = make_inputs(Case(tokens=3), "cpu")
    assert form(x.q, x.k, x.v)[1] is None


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("decay", ["none", "head", "token", "reset"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
def test_forms_agree(tokens: int, decay: str, initial: bool, packed: bool) -> None:
    heads = {"none": (2, 1, 2, 1), "head": (1, 2, 4, 2), "token": (2, 2, 1, 4), "reset": (2, 2, 2, 2)}[decay]
    case = Case(tokens, 5, 7, heads, decay, packed, initial, torch.float64)
    x = make_inputs(case, "cpu")
    one, other = (run_oracle(x, form) for form in FORMS)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape
        agree = error(one[name], other[name]) < 1e-11
        assert agree or (one[name] - other[name]).abs().max() < 1e-14, name


@pytest.mark.parametrize("form", FORMS)
def test_packing_is_separate_calls(form) -> None:
    x = make_inputs(Case(tokens=20, packed=True, dtype=torch.float64), "cpu")
    o, final = form(
        x.q, x.k, x.v, x.log_decay, initial_state=x.initial_state, output_final_state=True, cu_seqlens=x.cu_seqlens
    )
    bounds = x.cu_seqlens.tolist()
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        arguments = [t[:, a:b] for t in (x.q, x.k, x.v, x.log_decay)]
        alone, end = form(*arguments, initial_state=x.initial_state[n : n + 1], output_final_state=True)
        torch.testing.assert_close(o[:, a:b], alone, rtol=0, atol=0)
        torch.testing.assert_close(final[n : n + 1], end, rtol=0, atol=0)
