"""Pieces the kernels share: matrix products of narrow operands, and decays summed over a run of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from ..interpreter import interpreting

# The interpreter keeps bfloat16 as bare integers and multiplies those; there products take float32 copies.
_WIDEN = tl.constexpr(interpreting())


@triton.jit
def dot(x, y):
    """x @ y summed in float32; float32 operands are multiplied as such, never as TF32."""
    if _WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, out_dtype=tl.float32, input_precision="ieee")


@triton.jit
def largest(x):
    """Largest absolute entry, 1 for zeros: float16 operands are divided by it, so that none overflows or vanishes."""
    top = tl.max(tl.max(tl.abs(x), 1), 0)
    return tl.where(top > 0, top, 1.0)


@triton.jit
def narrow_dot(x, y, IS_FP16: tl.constexpr):
    """x @ y with x float32 brought to y's type."""
    if IS_FP16:
        top = largest(x)
        return dot((x / top).to(y.dtype), y) * top
    else:
        return dot(x.to(y.dtype), y)


@triton.jit
def dot_narrow(x, y, IS_FP16: tl.constexpr):
    """x @ y with y float32 (a state, or decayed values) brought to x's type."""
    if IS_FP16:
        top = largest(y)
        return dot(x, (y / top).to(x.dtype)) * top
    else:
        return dot(x, y.to(x.dtype))


@triton.jit
def decayed(S, g):
    """S * exp(g), for a scalar g, with the factor in two float32 parts.

    A factor rounded once and applied at every chunk errs to the same side each time: over thousands of chunks that is
    a hundred times float32's rounding.
    """
    exact = tl.exp(g.to(tl.float64))
    high = exact.to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    return S * high + S * low
