"""What a decoding mode is, what a model answers in it, and how the answer is compared with the truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .truth import Prompts, Truth, relative_error

# Float32 forwards of these models agree to about 1e-6; every wrong answer seen so far is above 1e-2.
FLOAT32_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One sequence as the model saw or wrote it, with padding taken out.

    tokens: the whole sequence. logits: float [n, vocab] on the CPU, what the model gave at positions
    `start` to `start + n - 1` of the sequence.
    """

    tokens: list[int]
    start: int
    logits: torch.Tensor


@dataclass(frozen=True)
class Answer:
    """What a model gives in one mode.

    rows: sequences, whose logits are compared with cache-free forwards of the stock model on the same tokens.
    values: further tensors by name, compared one by one with those of `Mode.expect`.
    measured: an error the mode computed itself, where the truth needs what only the run knows.
    """

    rows: list[Row] = field(default_factory=list)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    measured: float = 0.0


@dataclass(frozen=True)
class Expected:
    """The truth of a mode: the token sequences (None where the tokens were given, not chosen) and further tensors."""

    tokens: list[list[int]] | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)


def _given(truth: Truth) -> Expected:
    return Expected()


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Mode:
    """One way to decode with a model, as data.

    name: a short identifier. title: a phrase for people.
    run(model, prompts) -> Answer: what the model under test gives. Raises where the model can not do it.
    expect(truth) -> Expected: what it must give, from cache-free forwards of the stock model.
    prepare(model) -> model: a change of the model (adapters, say) that both the truth and the model under test need;
        called with a copy.
    missing() -> None, or what this machine lacks to run the mode.
    tolerance: largest relative error of logits and values (RMS of the difference / RMS of the truth).
    """

    name: str
    title: str
    run: Callable[[torch.nn.Module, Prompts], Answer]
    expect: Callable[[Truth], Expected] = _given
    prepare: Callable[[torch.nn.Module], torch.nn.Module] | None = None
    missing: Callable[[], str | None] = _always
    tolerance: float = FLOAT32_TOLERANCE


@dataclass(frozen=True)
class Outcome:
    """Whether a model agrees with the truth in a mode, its relative error (inf if it raised) and, if not, why."""

    agrees: bool
    error: float
    reason: str = ""


class ModeError(RuntimeError):
    """A model answered, but not in the mode it was asked for: a cache ignored, a graph compiled again."""


def check(
    mode: Mode,
    model: torch.nn.Module,
    *,
    truth: Truth,
    tolerance: float | None = None,
    exact: bool = True,
) -> Outcome:
    """Run `mode` on `model` and compare with `truth`. An exception of the model is an outcome, not an error.

    truth: of the stock model with the same weights and on the same device; its prompts are used.
    tolerance: instead of the mode's own. exact=False compares the logits of what the model wrote, not the tokens
    themselves: for half precision, where two right answers may choose differently between nearly equal logits.
    """
    limit = mode.tolerance if tolerance is None else tolerance
    if mode.prepare is not None:
        model, truth = mode.prepare(copy.deepcopy(model)), truth.changed(mode.prepare)
    try:
        answer = mode.run(model, truth.prompts)
    except Exception as error:
        return Outcome(False, math.inf, f"{type(error).__name__}: {error}")
    return compare(answer, truth.expected(mode.expect), truth, limit=limit, exact=exact)


def compare(answer: Answer, expected: Expected, truth: Truth, *, limit: float, exact: bool) -> Outcome:
    """Compare an answer with what was expected of it: logits and values within `limit`, tokens equal if `exact`."""
    errors = {"what the mode measured": answer.measured}
    for index, row in enumerate(answer.rows):
        stop = row.start + len(row.logits)
        errors[f"the logits of row {index}"] = relative_error(row.logits, truth.logits(row.tokens)[row.start : stop])
    for name, value in expected.values.items():
        errors[name] = relative_error(answer.values[name], value)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    error = errors[worst]
    if not error <= limit:
        return Outcome(False, error, f"{worst}: relative error {error:.2g}, at most {limit:.2g} is right")
    tokens = [row.tokens for row in answer.rows]
    if exact and expected.tokens is not None and tokens != expected.tokens:
        return Outcome(False, error, f"tokens {_first_difference(tokens, expected.tokens)}")
    return Outcome(True, error)


def _first_difference(got: list[list[int]], want: list[list[int]]) -> str:
    if len(got) != len(want):
        return f"of {len(got)} rows, {len(want)} rows are right"
    for row, (a, b) in enumerate(zip(got, want, strict=True)):
        if a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"of row {row} differ from position {place} of {len(b)}"
    raise AssertionError("no difference")
