"""Compiles kernels for an H100, without one: a program of its own, as here they are not interpreted.

Prints a line of JSON for every compilation: the kernel's name, its shared memory in bytes, and what its code loads and
stores.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from leet_linear_attention import DecodeState
from leet_linear_attention.triton import launcher

# Decode steps: width of the keys and of the values, tokens, buffer.
STEPS = [(128, 128, 1, 16), (128, 128, 4, 16), (256, 512, 1, 16), (256, 512, 4, 16)]
STEPS += [(128, 64, 17, 32), (512, 64, 1, 64), (128, 64, 64, 64)]
CASES = ["plain", "per-token", "narrow", "wide", "steps", "fused", "linear"]


class Driver:
    """Stands for the driver of a device of which nothing is asked but what to compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class Compiling:
    """In place of a kernel: its launches compile it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        mocked = [MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
        kernel = self._kernel.warmup(*mocked, grid=grid, **options)
        code = kernel.asm["ptx"]
        found = {
            "kernel": self._kernel.__name__,
            "shared": kernel.metadata.shared,
            "products": len(re.findall(r"wgmma\.mma_async|mma\.sync", code)),
            # of 16 bits each, where 16 bytes at a time are as many as a thread can take
            "narrow": len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.[bu]16\s", code)),
        }
        print(json.dumps(found), flush=True)


def operator(key_dim: int, value_dim: int, *, per_token: bool, tokens: int = 128) -> None:
    """Compile forward and backward in bfloat16; with a decay per token its gradient too."""
    from leet_linear_attention.triton import backward, forward

    heads = 2

    def normal(width: int) -> torch.Tensor:
        return torch.zeros(1, tokens, heads, width, dtype=torch.bfloat16)

    q, k, v, do = normal(key_dim), normal(key_dim), normal(value_dim), normal(value_dim)
    g = torch.zeros((1, tokens, heads) if per_token else (heads,))
    forward.forward(q, k, v, g, None, None, 1.0, False)
    backward.backward(do, None, q, k, v, g, None, None, 1.0, per_token)


def steps(key_dim: int, value_dim: int, tokens: int, buffer: int) -> None:
    """Compile the decode step of that many tokens into such a buffer in bfloat16."""
    from leet_linear_attention.triton import step

    state = DecodeState.allocate(1, 2, key_dim, value_dim, buffer=buffer, dtype=torch.bfloat16)
    q, k, v = (torch.zeros(1, tokens, 2, width, dtype=torch.bfloat16) for width in (key_dim, key_dim, value_dim))
    tensors = (state.base, state.keys, state.values, state.log_decays, state.cursor)
    step.step(q, k, v, torch.zeros(2), *tensors, 1.0, state.buffer, state.keep)


def fused() -> None:
    """Compile what surrounds the operator, forward and backward in bfloat16."""
    from leet_hf.fused import route
    from leet_hf.fused.glu import gated
    from leet_hf.fused.norm import rms_norm
    from leet_hf.fused.norm_kernel import norm_of_sum
    from leet_hf.fused.rotary import turned
    from leet_hf.fused.silu_split import silu_split

    route._INTERPRETING = True  # on a CPU too

    def normal(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    x, gate, weight = normal(8, 2048), normal(8, 2048), normal(2048)
    rms_norm(x, weight, eps=1e-6, gate=gate, activation="sigmoid", method="triton").sum().backward()
    rms_norm(x, weight, eps=1e-6, method="triton").sum().backward()
    with torch.no_grad():
        norm_of_sum(x, gate, weight, 1e-6, True, torch.bfloat16)
    gated(x, gate, "silu", method="triton").sum().backward()
    angles = torch.zeros(1, 8, 1, 128)
    for kind in ("rope", "theta_shift"):
        turned(
            normal(1, 8, 4, 256), normal(1, 8, 4, 256), cos=angles.cos(), sin=angles.sin(), kind=kind, method="triton"
        )
    q, *_ = silu_split(normal(1, 8, 4 * 3 * 128), dim=128, method="triton")
    q.sum().backward()


def linear() -> None:
    """Compile linear layers of a decode step."""
    from leet_hf.fused.joined import gated_linear, joined_linear

    for dtype, rows in ((torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float32, 8)):
        x, weight = torch.zeros(rows, 2048, dtype=dtype), torch.zeros(64, 2048, dtype=dtype)
        joined_linear(x, [weight] * 4)
        if dtype == torch.bfloat16:
            gated_linear(x, weight, weight, "silu")
            joined_linear(x, [weight])


def main(case: str) -> None:
    warnings.simplefilter("error", UserWarning)  # what Triton would say to every user
    triton.runtime.driver.set_active(Driver())
    launch = launcher.Launcher.__init__  # before the modules that hold kernels are imported
    launcher.Launcher.__init__ = lambda self, kernel, overlaps=False: launch(self, Compiling(kernel), overlaps)  # type: ignore[method-assign]
    launcher._overlap.on = True  # as in a recorded step
    if case == "plain":
        operator(128, 128, per_token=False)
    elif case == "per-token":
        operator(128, 128, per_token=True)
    elif case == "narrow":
        operator(64, 128, per_token=True)
    elif case == "wide":
        operator(256, 512, per_token=False)
    elif case == "fused":
        fused()
    elif case == "linear":
        linear()
    else:
        for step in STEPS:
            steps(*step)


if __name__ == "__main__":
    main(sys.argv[1])
