"""Pieces the kernels share: products of narrow operands, decays summed over tokens, addresses, overlapping."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
def factors(top, LEAST: tl.constexpr, ROOM: tl.constexpr):
    """(up, down), powers of two whose product is 1: up takes ``top``, >= 0, to [2^ROOM, 2^(ROOM + 1)).

    Only the exponent is read, so that scaling rounds nothing and costs no division. Below 2^LEAST up stays the same:
    it must not take what it is applied to besides past float32's range.
    """
    power = tl.maximum(top.to(tl.int32, bitcast=True) & 0x7F800000, (127 + LEAST) << 23)
    power = tl.minimum(power, 252 << 23)  # infinities and NaN stay what they are
    up = ((253 << 23) - power).to(tl.float32, bitcast=True) * (2 << ROOM)
    return up, (power - (ROOM << 23)).to(tl.float32, bitcast=True)


@triton.jit
def narrow_dot(x, y, IS_FP16: tl.constexpr):
    """x @ y with x float32 (scores) brought to y's type."""
    if IS_FP16:
        up, down = factors(tl.max(tl.abs(x), 1), -100, 14)
        return dot((x * up[:, None]).to(y.dtype), y) * down[:, None]
    else:
        return dot(x.to(y.dtype), y)


@triton.jit
def dot_scaled(x, y):
    """(x @ y / down, down) with y float32 brought to x's type, float16: one factor, so that no entry overflows."""
    up, down = factors(tl.max(tl.abs(y), None), -100, 14)
    return dot(x, (y * up).to(x.dtype)), down


@triton.jit
def dot_narrow(x, y, IS_FP16: tl.constexpr):
    """x @ y with y float32 (a state) brought to x's type."""
    if IS_FP16:
        product, down = dot_scaled(x, y)
        return product * down
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


@triton.jit
def token_of(ptr, i_b, t, i_h, group, sb, st, sh, ALIGN: tl.constexpr):
    """Where token ``t`` of row ``i_b`` and state head ``i_h`` lies, of a tensor [B, T, H / group, D].

    sb and sh are its strides over ALIGN, st is its stride of tokens.
    """
    return ptr + (i_b * sb * ALIGN + t * st + (i_h // group) * sh * ALIGN)


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Inside ``launcher.overlapping``: the launch after this one may begin, then the one before this one has ended.

    Comes before all that a kernel reads or writes. A launch ends when all its programs have, so everything before that
    one has ended too.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
