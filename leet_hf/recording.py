"""Recording a function of the GPU once and replaying it: a CUDA graph, and what there must be to make one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

# Two captures at once would share torch's capture stream.
_capturing = threading.Lock()


class Running(Protocol):
    """A replay that was launched beside the current stream. output: its result, there after `wait`."""

    output: Tensor

    def wait(self) -> None:
        """Let what the current stream does next come after it. The host does not wait."""


class Recorded(Protocol):
    """A function that was recorded on tensors that stay where they are."""

    def replay(self) -> Tensor:
        """Run it on what these tensors hold now. The result is overwritten by the next replay."""

    def launch(self) -> Running:
        """Replay it beside the current stream, after all that this stream has to do so far."""


class Recorder(Protocol):
    """Makes recordings, none of which runs anything, and says how much memory they hold."""

    @property
    def nbytes(self) -> int:
        """Bytes that all recordings hold, beside the tensors they were given."""

    def record(self, function: Callable[[], Tensor]) -> Recorded:
        """Record a function that has run before (kernels are compiled then), without running it."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside: what is freed then, another model's graphs say, may end a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _CudaRunning:
    def __init__(self, done: torch.cuda.Event, output: Tensor) -> None:
        self._done, self.output = done, output

    def wait(self) -> None:
        self._done.wait(torch.cuda.current_stream(self.output.device))  # the current device may be another


class _CudaGraph:
    """beside: the stream of replays that are launched ahead."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor, beside: torch.cuda.Stream) -> None:
        self._graph, self._output, self._beside = graph, output, beside

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._output

    def launch(self) -> Running:
        self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        with torch.cuda.stream(self._beside):
            self._graph.replay()
        return _CudaRunning(self._beside.record_event(), self._output)


class CudaRecorder:
    """Records CUDA graphs of one device, which share one memory pool: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._beside = torch.cuda.Stream(device)
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def record(self, function: Callable[[], Tensor]) -> Recorded:
        with _capturing, torch.cuda.device(self._device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # as torch.cuda.graph will: what is reserved more afterwards is the graph's
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads go on working with the GPU meanwhile.
                with _no_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    output = function()
            except Exception:
                # What was begun may not have been ended: torch takes no second recording into such a pool.
                self._pool = torch.cuda.graph_pool_handle()
                raise
            self._bytes += max(0, torch.cuda.memory_reserved() - before)
            return _CudaGraph(graph, output, self._beside)


def recorder_for(device: torch.device) -> Recorder | str:
    """What records for a device, or why nothing can."""
    if device.type != "cuda":
        return f"the model is on {device.type}: graphs are of CUDA devices"
    if torch.version.hip is not None:
        return "PyTorch was built for ROCm: graphs are of CUDA devices"
    return CudaRecorder(device)
