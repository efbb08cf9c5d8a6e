"""What a decode step does in several launches though one would do: seen in its first run, done so from the next on.

Three things are looked for: linear layers of one input, such as q, k, v and a gate; a gated unit of two of them; and a
sum, as of a residual, whose norm is taken. Nothing has to be known of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leet_linear_attention.dispatch import available_methods

from . import glu, joined, norm
from .route import NARROW

ADDITIONS = (torch.Tensor.add, torch.add, torch.Tensor.__add__)


class Unit(NamedTuple):
    """A gated unit of two linear layers: their weights, and its activation."""

    gate: Tensor
    up: Tensor
    activation: str


class Group(NamedTuple):
    """Weights of one input, in the order they were asked for; unit: what becomes of them, where they are its pair."""

    weights: list[Tensor]
    unit: Unit | None = None


class Norm(NamedTuple):
    """What a norm was given besides its input."""

    weight: Tensor | None
    eps: float
    each: bool
    dtype: torch.dtype

    def equals(self, other: Norm) -> bool:
        return self.weight is other.weight and self[1:] == other[1:]


class Early:
    """A result computed before it was asked for, and the inputs it is of.

    It serves while nothing has been written to these since, which tensors of inference mode can not tell.
    """

    def __init__(self, result: Tensor, asked: Any, *inputs: Tensor) -> None:
        self.result, self.asked, self._inputs = result, asked, inputs
        self._versions = [_version(x) for x in inputs]

    def serves(self, *inputs: Tensor) -> bool:
        same = len(inputs) == len(self._inputs) and all(a is b for a, b in zip(inputs, self._inputs, strict=True))
        return same and self._versions == [_version(x) for x in inputs]


@dataclass
class Watched:
    """What the first run did. Tensors are kept, so that no id is another's."""

    linears: list[tuple[Tensor, int, Tensor, Tensor]] = field(default_factory=list)  # x, its version, weight, result
    sums: list[Tensor] = field(default_factory=list)
    norms: dict[int, Norm] = field(default_factory=dict)  # by the place of the sum that they are of
    units: list[Unit] = field(default_factory=list)


class Learned(TorchFunctionMode):
    """Inside it, for the second time and later, what the first run showed takes one launch, without gradients.

    The first function that is asked for computes for the others too. They are given that if they ask for the same of
    the same tensors, and else compute it themselves: another order, or other weights, cost time and change nothing.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self._device_type = device_type
        self._groups: dict[int, Group] | None = None  # by the id of the weight that comes first; None: not seen yet
        self._norms: dict[int, Norm] = {}
        self._start()

    def _start(self) -> None:
        self._watched = Watched()
        self._early: dict[Any, Early] = {}
        self._sums = 0

    def __enter__(self) -> Learned:
        self._start()
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self._groups is None and error is None:
            self._groups, self._norms = self._found(), self._watched.norms
        self._start()

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs:
            return function(*args, **kwargs)
        if function is F.linear and len(args) in (2, 3) and args[2:] in ((), (None,)):
            if joined.joinable(args[0], args[1], self._device_type):
                return self._linear(args[0], args[1])
        elif function in ADDITIONS and len(args) == 2 and self._summable(*args):
            return self._sum(*args)
        elif function is norm.by_kernel:
            return self._norm(*args)
        elif function is glu.by_kernel:
            return self._unit(*args)
        return function(*args)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._groups is None:
            out = F.linear(x, weight)
            self._watched.linears.append((x, _version(x), weight, out))
            return out
        early = self._early.pop(id(weight), None)
        if early is not None and early.serves(x):
            return early.result
        group = self._groups.get(id(weight))
        if group is None or any(w.device != x.device or w.dtype != x.dtype for w in group.weights):
            return F.linear(x, weight)
        first, *others = self._products(x, group)
        self._early |= {id(w): Early(out, None, x) for w, out in zip(group.weights[1:], others, strict=True)}
        return first

    def _products(self, x: Tensor, group: Group) -> list[Tensor]:
        if group.unit is None:
            return joined.joined_linear(x, group.weights)
        gate, up, result = joined.gated_linear(x, *group.unit)
        self._early[id(gate)] = Early(result, group.unit.activation, gate, up)
        return [gate if weight is group.unit.gate else up for weight in group.weights]

    def _unit(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        early = self._early.pop(id(gate), None)
        if early is not None and early.asked == activation and early.serves(gate, up):
            return early.result
        if self._groups is None:
            made_of = {id(out): (x, version, weight) for x, version, weight, out in self._watched.linears}
            a, b = made_of.get(id(gate)), made_of.get(id(up))
            if a is not None and b is not None and a[0] is b[0] and a[1] == b[1]:
                self._watched.units.append(Unit(a[2], b[2], activation))
        return glu.by_kernel(gate, up, activation)

    def _sum(self, x: Tensor, other: Tensor) -> Tensor:
        place = self._sums
        self._sums += 1
        wanted = self._norms.get(place)
        if wanted is None or (wanted.weight is not None and wanted.weight.shape[-1:] != x.shape[-1:]):
            total = torch.add(x, other)
            if self._groups is None:
                self._watched.sums.append(total)
            return total
        total, normed = norm.of_sum(x, other, *wanted)
        self._early[id(total)] = Early(normed, wanted, total)
        return total

    def _norm(self, x: Tensor, *rest: Any) -> Tensor:
        weight, gate, eps, activation, each, dtype = rest
        wanted = Norm(weight, eps, each, dtype)
        if gate is None and activation == "linear":
            early = self._early.pop(id(x), None)
            if early is not None and early.serves(x) and wanted.equals(early.asked):
                return early.result
            if self._groups is None:
                places = [place for place, total in enumerate(self._watched.sums) if total is x]
                self._watched.norms |= {place: wanted for place in places}
        return norm.by_kernel(x, *rest)

    def _summable(self, x: Any, other: Any) -> bool:
        if type(x) is not Tensor or type(other) is not Tensor or x.dtype not in NARROW or x.device != other.device:
            return False
        if x.device.type != self._device_type or x.dtype != other.dtype or x.shape != other.shape or x.dim() == 0:
            return False
        if not (x.is_contiguous() and other.is_contiguous()) or not 0 < x.shape[-1] <= norm.MOST:
            return False
        return available_methods(x.device, x.dtype)["triton"] is None

    def _found(self) -> dict[int, Group]:
        """What to do in one launch, each done once: what a recording launches has to be compiled before."""
        by_input: dict[tuple[int, int], tuple[Tensor, dict[int, Tensor]]] = {}
        for x, version, weight, _ in self._watched.linears:
            by_input.setdefault((id(x), version), (x, {}))[1].setdefault(id(weight), weight)
        units = {id(unit.gate): unit for unit in self._watched.units if _is_pair(unit)}
        groups: dict[int, Group] = {}
        for x, weights in by_input.values():
            for group in _cut(weights, units):
                if len(group.weights) > 1 or joined.pays_alone(x):
                    self._products(x, group)
                    groups[id(group.weights[0])] = group
        for place, wanted in self._watched.norms.items():
            total = self._watched.sums[place]
            norm.of_sum(total, total, *wanted)
        return groups


def _is_pair(unit: Unit) -> bool:
    """Whether one launch takes a unit with its two layers."""
    return unit.gate.shape == unit.up.shape and unit.gate.element_size() == 2


def _cut(weights: dict[int, Tensor], units: dict[int, Unit]) -> list[Group]:
    """Weights of one input, in groups that a launch can take: pairs of gated units, and of the others a few each."""
    groups, left = [], dict(weights)
    for unit in units.values():
        pair = [w for w in weights.values() if w is unit.gate or w is unit.up]
        if len(pair) == 2 and all(id(w) in left for w in pair):
            groups.append(Group(pair, unit))
            left = {key: w for key, w in left.items() if not any(w is member for member in pair)}
    rest = [*left.values()]
    return groups + [Group(rest[i : i + joined.MOST_WEIGHTS]) for i in range(0, len(rest), joined.MOST_WEIGHTS)]


def _version(x: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return -1 if x.is_inference() else x._version
