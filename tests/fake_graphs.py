"""A recorder for the CPU that behaves as CUDA graphs do: addresses and the host's values are those of the recording.

And small models and calls for it; the fixture `recorders` has every model take it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
from leet_hf import patch_model
from leet_linear_attention import checks

ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default)


class _Recording(TorchDispatchMode):
    """Notes every operation, runs it, and can put back what was overwritten that had been there before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._born: set[int] = set()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        written = [
            value
            for place, value in zip(func._schema.arguments, args, strict=False)
            if place.alias_info is not None and place.alias_info.is_write and isinstance(value, Tensor)
        ]
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._born and storage._cdata not in self._kept:
                whole = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
                self._kept[storage._cdata] = (whole, whole.clone())
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._born.add(x.untyped_storage()._cdata)
        self.calls.append((func, args, kwargs, out))
        return out

    def restore(self) -> None:
        for tensor, kept in self._kept.values():
            tensor.copy_(kept)


class FakeRunning:
    """A replay beside the current stream: here it has not even begun before someone waits for it."""

    def __init__(self, graph: FakeGraph, output: Tensor) -> None:
        self._graph: FakeGraph | None = graph
        self.output = output

    def wait(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        self._graph = None

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("events of a device can not be copied")


class FakeGraph:
    """What was recorded, as calls on the tensors of the recording; `replays` and those `launched` ahead are counted."""

    def __init__(self, calls: list[tuple[Any, Any, Any, Any]], output: Tensor) -> None:
        self._calls, self._output, self.replays, self.launched = calls, output, 0, 0

    def launch(self) -> FakeRunning:
        self.launched += 1
        return FakeRunning(self, self._output)

    @torch.no_grad()
    def replay(self) -> Tensor:
        self.replays += 1
        for func, args, kwargs, out in self._calls:
            new = func(*args, **kwargs)
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, x in zip(tree_leaves(out), tree_leaves(new), strict=True):
                # Results have the addresses of the recording; views and changes in place have them already.
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                    old.copy_(x)
        return self._output


class FakeRecorder:
    """Records for any device. nbytes: what it says its recordings hold. fail: raise an error with this text."""

    def __init__(self, nbytes: int = 0, fail: str | None = None) -> None:
        self.nbytes, self.fail, self.graphs = nbytes, fail, []  # type: ignore[var-annotated]

    def record(self, function: Callable[[], Tensor]) -> FakeGraph:
        recording = _Recording()
        looks = checks.looks_at_values
        with torch.no_grad():
            try:
                checks.looks_at_values = lambda x: False  # as on a GPU
                with recording:
                    output = function()
                    if self.fail is not None:
                        raise RuntimeError(self.fail)
            finally:
                checks.looks_at_values = looks
                recording.restore()
        self.graphs.append(FakeGraph(recording.calls, output))
        return self.graphs[-1]

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)


OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def replays(recorders: list[FakeRecorder]) -> int:
    return sum(recorder.replays for recorder in recorders)


def ids(rows: int = 1, tokens: int = 11, seed: int = 5) -> Tensor:
    return torch.tensor(tiny.prompts((tokens,) * rows, seed))


def patched(model: Any) -> Any:
    return patch_model(model, method="torch")  # Triton's interpreter is slow


def stock_tokens(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    """Of the same weights without recorded steps."""
    plain = patch_model(copy.deepcopy(model), method="torch", decode_graphs=False)
    return plain.generate(prompt, **OPTIONS | options)
