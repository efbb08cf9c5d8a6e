"""The kernels of gated linear units, and what they share: activations and their derivatives in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leet_linear_attention.triton.common import wait_for_inputs
from leet_linear_attention.triton.launch import Plans, form_of
from leet_linear_attention.triton.launcher import Launch, Launcher, device_index

SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def activated(x, GELU: tl.constexpr):
    """(act(x), its derivative) of a float32 x: gelu by the error function, or silu."""
    if GELU:
        below = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * below, below + x * NORMAL_DENSITY * tl.exp(-0.5 * x * x)
    else:
        below = 1.0 / (1.0 + tl.exp(-x))
        return x * below, below * (1.0 + x * (1.0 - below))


@triton.jit(do_not_specialize=["N", "blocks", "stride_gate", "stride_up"])
def gated_kernel(
    gate_ptr, up_ptr, out_ptr, N, blocks, stride_gate, stride_up,
    BLOCK: tl.constexpr, GELU: tl.constexpr, ALIGN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows * blocks,), blocks fastest. N and the strides of rows over ALIGN; out contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < N.to(tl.int64) * ALIGN - first
    wait_for_inputs(OVERLAP)
    gate = tl.load(gate_ptr + row * stride_gate * ALIGN + first + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up * ALIGN + first + i, mask=mask, other=0.0).to(tl.float32)
    act, _ = activated(gate, GELU)
    tl.store(out_ptr + row * N * ALIGN + first + i, (act * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "blocks", "stride_dout", "stride_gate", "stride_up"])
def gated_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, N, blocks, stride_dout, stride_gate, stride_up,
    BLOCK: tl.constexpr, GELU: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """As ``gated_kernel``; dgate and dup contiguous."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < N.to(tl.int64) * ALIGN - first
    dout = tl.load(dout_ptr + row * stride_dout * ALIGN + first + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate * ALIGN + first + i, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up * ALIGN + first + i, mask=mask, other=0.0).to(tl.float32)
    act, slope = activated(gate, GELU)
    at = row * N * ALIGN + first + i
    tl.store(dgate_ptr + at, (dout * up * slope).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, (dout * act).to(dup_ptr.dtype.element_ty), mask=mask)


_forward, _backward, _plans = Launcher(gated_kernel, overlaps=True), Launcher(gated_backward_kernel), Plans()
BLOCK = 1024


def _run(launcher: Launcher, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], gelu: bool) -> None:
    """Launch over inputs of one shape, taken as rows of entries; contiguous ones are a single row."""
    if inputs[0].numel() == 0:
        return
    if not all(x.is_contiguous() for x in inputs):
        inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)  # views wherever rows lie at one stride
    key = (launcher, device_index(inputs[0]), gelu, form_of(*inputs))
    _plans.of(key, lambda: _launch(launcher, inputs, gelu))(*inputs, *outputs)


def _launch(launcher: Launcher, inputs: tuple[torch.Tensor, ...], gelu: bool) -> Launch:
    x = inputs[0]
    rows, width, strides = 1, x.numel(), [0] * len(inputs)
    if not all(x.is_contiguous() for x in inputs):
        (rows, width), strides = x.shape, [x.stride(0) for x in inputs]
    align = 16 // x.element_size()
    if any(n % align for n in (width, *strides)):
        align = 1
    blocks = triton.cdiv(width, BLOCK)
    numbers = (width // align, blocks, *(stride // align for stride in strides))
    return Launch(launcher, (rows * blocks,), device_index(x), numbers, (BLOCK, gelu, align), 4, 1)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up, contiguous, for tensors of one shape and dtype with unit last stride."""
    out = gate.new_empty(gate.shape)
    _run(_forward, (gate, up), (out,), activation == "gelu")
    return out


def gated_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, contiguous."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _run(_backward, (dout, gate, up), (dgate, dup), activation == "gelu")
    return dgate, dup
