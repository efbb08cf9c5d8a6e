"""What autograd keeps of q, k and v: nothing, where they can be made again from what it keeps anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Again = Callable[[], tuple[Tensor, ...]]


def remake(result: Tensor, inputs: tuple[Tensor, ...], again: Again) -> bool:
    """Let the node that made `result` forget those of its saved tensors that are `inputs`; whether it does.

    result: of a `torch.autograd.Function` that saved `inputs` first, in this order, as the operator does. again: makes
    tensors of the same values; called in the backward, without gradients, when the first of them is asked for. They are
    dropped as they are taken, so that they live no longer than that node's backward.

    Nothing is changed while compiling, where the node saved other tensors (masked ones, say), nor where hooks already
    say what becomes of saved tensors: checkpointing without reentry and offloading do.
    """
    if torch.compiler.is_compiling():
        return False
    saved = getattr(result.grad_fn, "_raw_saved_tensors", None)
    if saved is None or len(saved) < len(inputs):
        return False
    remade = _Remade(inputs, again)
    try:
        for place in range(len(inputs)):
            saved[place].register_hooks(remade.packer(place), remade.unpack)
    except RuntimeError:  # there are hooks already, on all of them or on none
        return False
    finally:
        forgot = remade.finish()
    return forgot


class _Remade:
    """The inputs of one node, as its hooks see them."""

    def __init__(self, inputs: tuple[Tensor, ...], again: Again) -> None:
        self._views = [_view(x) for x in inputs]
        self._again = again
        self._made: dict[int, Tensor] = {}
        self._forgot = 0

    def packer(self, place: int) -> Callable[[Tensor], Any]:
        def pack(tensor: Tensor) -> Any:
            if _view(tensor) != self._views[place]:
                return tensor
            self._forgot += 1
            return place

        return pack

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._made:
            with torch.no_grad():
                self._made = dict(enumerate(self._again()))
        return self._made.pop(packed)

    def finish(self) -> bool:
        """The addresses mean nothing once the inputs are gone."""
        self._views = []
        return self._forgot > 0


def _view(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype
