"""Kernel of a router of experts: a token's logits, their softmax, its experts and their shares, in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from leet_linear_attention.triton.common import wait_for_inputs
from leet_linear_attention.triton.launcher import Launcher


@triton.jit(do_not_specialize=["E"])
def router_kernel(
    x_ptr, weight_ptr, logits_ptr, share_ptr, index_ptr, E,
    D: tl.constexpr, TOP: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (T,). x [T, D], weight [E, D]; logits [T, E], share float32 and index int64 [T, TOP], the largest first."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BE)
    d = tl.arange(0, BD)
    mask_e = e < E
    wait_for_inputs(OVERLAP)
    products = tl.zeros((BE, BD), dtype=tl.float32)
    for d0 in range(0, D, BD):
        mask_d = d0 + d < D
        x = tl.load(x_ptr + t * D + d0 + d, mask=mask_d, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + e[:, None] * D + (d0 + d)[None, :], mask=mask_e[:, None] & mask_d[None, :], other=0.0)
        products += w.to(tl.float32) * x[None, :]
    logits = tl.sum(products, 1).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + t * E + e, logits, mask=mask_e)
    wide = tl.where(mask_e, logits.to(tl.float32), float("-inf"))
    exps = tl.exp(wide - tl.max(wide, 0))
    total = tl.sum(exps, 0)
    left = tl.where(mask_e, exps / total, -1.0)
    place = tl.arange(0, BT)
    shares = tl.zeros((BT,), dtype=tl.float32)
    chosen = tl.zeros((BT,), dtype=tl.int64)
    for j in tl.static_range(TOP):
        top = tl.max(left, 0)
        first = tl.minimum(tl.min(tl.where(left == top, e, BE), 0), E - 1)  # nothing equals NaN
        shares = tl.where(place == j, top, shares)
        chosen = tl.where(place == j, first.to(tl.int64), chosen)
        left = tl.where(e == first, -1.0, left)
    shares = shares / tl.sum(shares, 0) + (total - total)  # a maximum passes NaN over
    tl.store(share_ptr + t * TOP + place, shares, mask=place < TOP)
    tl.store(index_ptr + t * TOP + place, chosen, mask=place < TOP)


route_tokens = Launcher(router_kernel, overlaps=True)
