"""The kernels of RMSNorm over the last dim, with a weight and a gate: one launch forward, one and a sum backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from leet_linear_attention.triton.common import wait_for_inputs
from leet_linear_attention.triton.launch import Plans, form_of
from leet_linear_attention.triton.launcher import Launch, Launcher, device_index
from leet_linear_attention.triton.tuning import blocks, processors

from .glu_kernel import activated

NONE, LINEAR, SIGMOID, SILU = (tl.constexpr(kind) for kind in range(4))
GATES = {"linear": 1, "sigmoid": 2, "silu": 3}  # 0: there is none


@triton.jit
def gated(x, GATE: tl.constexpr):
    """(act(x), its derivative) of a float32 gate."""
    if GATE == LINEAR:
        return x, tl.full(x.shape, 1.0, tl.float32)
    elif GATE == SIGMOID:
        below = 1.0 / (1.0 + tl.exp(-x))
        return below, below * (1.0 - below)
    else:
        return activated(x, False)


@triton.jit
def rounded(x, like_ptr, EACH: tl.constexpr):
    """float32 x with the digits of a tensor's dtype, where steps are rounded each."""
    if EACH:
        return x.to(like_ptr.dtype.element_ty).to(tl.float32)
    else:
        return x


@triton.jit
def weighted(x, w, x_ptr, w_ptr, EACH: tl.constexpr):
    """x * w, rounded as torch multiplies tensors of these dtypes: where they differ, float32 holds the product."""
    if x_ptr.dtype.element_ty == w_ptr.dtype.element_ty:
        return rounded(x * w, x_ptr, EACH)
    else:
        return x * w


@triton.jit(do_not_specialize=["rows", "stride_x", "stride_gate"])
def norm_kernel(
    x_ptr, w_ptr, gate_ptr, out_ptr, other_ptr, sum_ptr, rows, stride_x, stride_gate, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows,). Strides of rows over ALIGN; out contiguous; row i takes weight row i % GROUPS.

    other, sum: None, or contiguous, of x's shape and dtype: what the norm is of is then x + other, which goes to sum.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (i < D)
    wait_for_inputs(OVERLAP)
    x = tl.load(x_ptr + row * stride_x * ALIGN + i, mask=mask, other=0.0).to(tl.float32)
    if other_ptr is not None:
        x += tl.load(other_ptr + row * D + i, mask=mask, other=0.0).to(tl.float32)
        x = rounded(x, sum_ptr, True)
        tl.store(sum_ptr + row * D + i, x.to(sum_ptr.dtype.element_ty), mask=mask)
    y = rounded(x * tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps), x_ptr, EACH)
    if w_ptr is not None:
        w = tl.load(w_ptr + (row % GROUPS) * D + i, mask=mask, other=0.0).to(tl.float32)
        y = weighted(y, w, x_ptr, w_ptr, EACH)
    if GATE != NONE:
        gate = tl.load(gate_ptr + row * stride_gate * ALIGN + i, mask=mask, other=0.0).to(tl.float32)
        act, _ = gated(gate, GATE)
        y = y * rounded(act, gate_ptr, EACH)
    tl.store(out_ptr + row * D + i, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "steps", "stride_dout", "stride_x", "stride_gate"])
def norm_backward_kernel(
    dout_ptr, x_ptr, w_ptr, gate_ptr, dx_ptr, dw_ptr, dgate_ptr,
    tokens, steps, stride_dout, stride_x, stride_gate, eps,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, GATE: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Grid (programs * GROUPS,), groups fastest: each takes every `programs`-th block of tokens of its group.

    tokens: rows of a group. steps: blocks a program takes. Strides of rows over ALIGN; dx, dgate contiguous; dw
    [programs, GROUPS, D] float32: every program's sum over its rows.
    """
    group = tl.program_id(0) % GROUPS
    programs = tl.num_programs(0) // GROUPS
    first = tl.program_id(0) // GROUPS
    i = tl.arange(0, BLOCK_D)[None, :]
    if w_ptr is not None:
        w = tl.load(w_ptr + group * D + i, mask=i < D, other=0.0).to(tl.float32)
    if dw_ptr is not None:
        dw = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for step in range(steps):
        token = (first + step * programs).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        row = token * GROUPS + group
        mask = (token < tokens) & (i < D)
        x = tl.load(x_ptr + row * stride_x * ALIGN + i, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dout_ptr + row * stride_dout * ALIGN + i, mask=mask, other=0.0).to(tl.float32)
        # Of rows that are not there nothing may come, not even with eps = 0.
        scale = tl.where(token < tokens, tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps), 0.0)
        normed = x * scale
        if GATE != NONE:
            gate = tl.load(gate_ptr + row * stride_gate * ALIGN + i, mask=mask, other=0.0).to(tl.float32)
            act, slope = gated(gate, GATE)
            if dgate_ptr is not None:
                y = rounded(normed, x_ptr, EACH)
                if w_ptr is not None:
                    y = weighted(y, w, x_ptr, w_ptr, EACH)
                dgate = dy * y * slope
                tl.store(dgate_ptr + row * D + i, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
            dy *= rounded(act, gate_ptr, EACH)
        if dw_ptr is not None:
            dw += dy * rounded(normed, x_ptr, EACH)
        if w_ptr is not None:
            dy *= w
        dx = scale * (dy - normed * (tl.sum(dy * normed, 1, keep_dims=True) / D))
        tl.store(dx_ptr + row * D + i, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if dw_ptr is not None:
        at = (first.to(tl.int64) * GROUPS + group) * D + i
        tl.store(dw_ptr + at, tl.sum(dw, 0, keep_dims=True), mask=i < D)


_forward, _backward, _plans = Launcher(norm_kernel, overlaps=True), Launcher(norm_backward_kernel), Plans()
ENTRIES = 2048  # of a program of 4 warps: loads of 16 bytes, two each thread
WARPS = 16  # of each processor, in programs that go on to the next rows


def _block(dim: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program."""
    columns = triton.next_power_of_2(dim)
    return max(1, ENTRIES // columns), columns, min(max(columns // 512, 4), 16)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, D], by a view where its strides allow one, with unit last stride."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _laid_out(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, whose rows lie equally far apart: a kernel that knows the distance needs no view of it."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.stride(-1) == 1) else _rows(x)


def _aligned(*rows: torch.Tensor | None) -> tuple[int, list[int]]:
    """(A, strides of rows over A): A entries of the narrowest tensor are 16 bytes if every stride allows it, else 1."""
    there = [x for x in rows if x is not None]
    align = 16 // min(x.element_size() for x in there)
    strides = [0 if x is None else x.stride(0) for x in rows]
    if any(stride % align for stride in strides):
        return 1, strides
    return align, [stride // align for stride in strides]


def norm(
    x: torch.Tensor, weight: torch.Tensor | None, gate: torch.Tensor | None,
    eps: float, activation: str, each: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """x [..., D], weight None, [D] or [G, D], gate None or x's shape, to x's shape in dtype, contiguous."""
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        _launch_norm(x, weight, gate, out, None, None, eps, activation, each)
    return out


def norm_of_sum(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor | None, eps: float, each: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + other, its norm in dtype) for contiguous x and other of one shape and dtype, as two launches would."""
    total, out = torch.empty_like(x), x.new_empty(x.shape, dtype=dtype)
    if out.numel():
        _launch_norm(x, weight, None, out, other, total, eps, "linear", each)
    return total, out


def _launch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, gate: torch.Tensor | None, out: torch.Tensor,
    other: torch.Tensor | None, total: torch.Tensor | None, eps: float, activation: str, each: bool,
) -> None:  # fmt: skip
    x = _laid_out(x)
    if weight is not None:
        weight = weight.contiguous()
    if gate is not None:
        gate = _laid_out(gate)

    def make() -> Launch:
        x_rows, gate_rows = _rows(x), None if gate is None else _rows(gate)
        count, dim = x_rows.shape
        block_r, block_d, warps = _block(dim)
        align, strides = _aligned(x_rows, gate_rows)
        groups, kind = 1 if weight is None else weight.numel() // dim, 0 if gate is None else GATES[activation]
        return Launch(
            _forward, (blocks(count, block_r),), device_index(x), (count, *strides, eps),
            (dim, groups, block_r, block_d, align, kind, each), warps, 1,
        )  # fmt: skip

    form = form_of(x, weight, gate, other)
    launch = _plans.of((form, x.device, eps, activation, each, out.dtype), make)
    launch(x, weight, gate, out, other, total)


def norm_backward(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, gate: torch.Tensor | None,
    eps: float, activation: str, each: bool, need_weight: bool, need_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Gradients of x, of the weight and of the gate, contiguous, in their tensors' dtypes; None where not needed."""
    dx = x.new_empty(x.shape)
    dgate = gate.new_empty(gate.shape) if gate is not None and need_gate else None
    if x.numel() == 0:
        return dx, None if weight is None or not need_weight else torch.zeros_like(weight), dgate
    dout, x = _laid_out(dout), _laid_out(x)
    if weight is not None:
        weight = weight.contiguous()
    if gate is not None:
        gate = _laid_out(gate)

    def make() -> tuple[Launch, int]:
        dout_rows, x_rows, gate_rows = _rows(dout), _rows(x), None if gate is None else _rows(gate)
        count, dim = x_rows.shape
        block_r, block_d, warps = _block(dim)
        align, strides = _aligned(dout_rows, x_rows, gate_rows)
        groups, kind = 1 if weight is None else weight.numel() // dim, 0 if gate is None else GATES[activation]
        programs = pieces = blocks(count // groups, block_r)
        if weight is not None and need_weight:
            busy = 2 if device_index(x) < 0 else blocks(processors(device_index(x)) * WARPS, warps * groups)
            programs = min(pieces, busy)
        launch = Launch(
            _backward, (programs * groups,), device_index(x),
            (count // groups, blocks(pieces, programs), *strides, eps),
            (dim, groups, block_r, block_d, align, kind, each), warps, 1,
        )  # fmt: skip
        return launch, programs

    key = (form_of(dout, x, weight, gate), x.device, eps, activation, each, need_weight, need_gate)
    launch, programs = _plans.of(key, make)
    if weight is None or not need_weight:
        launch(dout, x, weight, gate, dx, None, dgate)
        return dx, None, dgate
    parts = x.new_empty((programs, *weight.shape), dtype=torch.float32)
    launch(dout, x, weight, gate, dx, parts, dgate)
    return dx, parts.sum(0).to(weight.dtype), dgate
