"""Passes over wide heads (both dims over 128): the states before every block of tokens first, then all blocks at once.

One program of the sweep would hold a state too large for a processor, and wait for itself four times a chunk. Here the
sweep leaves the state that meets each block of 256 tokens in memory, a 16-bit [X, Y] per block, and the outputs

    out_i = scale * ( sum_j D_ij (a_i . b_j) c_j  +  decay to the token * a_i^T S )

of all blocks are products without a chain: for the same (a, b, c) and either direction of time as in ``sweep``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shapes import sequence_count
from . import tuning
from .common import dot
from .launch import Operands, Sweep, chunk_slots
from .launcher import Launch, Launcher, aligned_strides

BLOCK = 256  # tokens; the longer, the fewer states in memory and the more products inside a block


@triton.jit(
    do_not_specialize=[
        "T", "N", "H", "group_a", "group_b", "group_c", "group_g",
        "sab", "sat", "sah", "sbb", "sbt", "sbh", "scb", "sct", "sch", "sgb", "sgt", "sgh",
    ]
)  # fmt: skip
def outputs_kernel(
    a_ptr, b_ptr, c_ptr, g_ptr, states_ptr, out_ptr, cu_ptr,
    T, N, H, group_a, group_b, group_c, group_g, scale,
    sab, sat, sah, sbb, sbt, sbh, scb, sct, sch, sgb, sgt, sgh,
    X: tl.constexpr, Y: tl.constexpr, L: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
    BN: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (slots * H * blocks of BR rows * tiles of Y,), tiles fastest: BR rows of a block of L tokens, BY columns.

    states: [slots, H, X, Y], or [slots, H, Y, X] where TRANSPOSED; out: [B, T, H, Y].
    """
    TILES: tl.constexpr = (Y + BY - 1) // BY
    ROWS: tl.constexpr = L // BR
    i_y = tl.program_id(0) % TILES
    row = (tl.program_id(0) // TILES) % ROWS * BR
    i_sh = (tl.program_id(0) // (TILES * ROWS)).to(tl.int64)
    i_h = i_sh % H
    slot = (i_sh // H).to(tl.int32)
    if PACKED:
        # the last sequence whose first slot is not behind this one
        i_n = 0
        above = N
        while above - i_n > 1:
            middle = (i_n + above) // 2
            behind = (tl.load(cu_ptr + middle) // L).to(tl.int32) + middle > slot
            i_n = tl.where(behind, i_n, middle)
            above = tl.where(behind, middle, above)
        bos = tl.load(cu_ptr + i_n).to(tl.int64)
        length = (tl.load(cu_ptr + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        start = (slot - (bos // L).to(tl.int32) - i_n) * L
        i_b = bos * 0
    else:
        blocks = tl.cdiv(T, L)
        i_b = (slot // blocks).to(tl.int64)
        bos = i_b * 0
        length = T
        start = (slot % blocks) * L
    n_valid = tl.minimum(length - start, L)
    if row >= n_valid:
        return

    t0 = bos + start
    sat *= ALIGN
    sbt *= ALIGN
    sct *= ALIGN
    a_ptr += i_b * sab * ALIGN + t0 * sat + (i_h // group_a) * sah * ALIGN
    b_ptr += i_b * sbb * ALIGN + t0 * sbt + (i_h // group_b) * sbh * ALIGN
    c_ptr += i_b * scb * ALIGN + t0 * sct + (i_h // group_c) * sch * ALIGN
    r = row + tl.arange(0, BR)
    n = tl.arange(0, BN)
    x = tl.arange(0, BX)
    y = i_y * BY + tl.arange(0, BY)
    mask_y = y < Y
    mask_r = r < n_valid

    if DECAY == 1:
        g_head = tl.load(g_ptr + i_h // group_g)
        to_row = tl.exp(g_head * tl.maximum(n_valid - 1 - r if REVERSE else r + 1, 0).to(tl.float32))
    if DECAY == 2:
        g_ptr += i_b * sgb + t0 * sgt + (i_h // group_g) * sgh
        all_rows = tl.arange(0, L)
        before = tl.load(g_ptr + all_rows * sgt, mask=all_rows < (n_valid if REVERSE else row), other=0.0)
        own = tl.cumsum(tl.load(g_ptr + r * sgt, mask=mask_r, other=0.0), 0)
        # from the block's beginning to the row; backward in time from the row to the block's end
        below = tl.sum(tl.where(all_rows < row, before, 0.0), 0)
        G_row = below + own
        to_row = tl.exp(tl.sum(before, 0) - G_row) if REVERSE else tl.exp(G_row)

    # Rows wider than BX go part by part: what comes of the parts adds up.
    states_ptr += i_sh * X * Y
    o = tl.zeros((BR, BY), dtype=tl.float32)
    for x0 in tl.range(0, X, BX, num_stages=1):
        mask_x = x0 + x < X
        a = tl.load(a_ptr + r[:, None] * sat + (x0 + x)[None, :], mask=mask_r[:, None] & mask_x[None, :], other=0.0)
        if TRANSPOSED:
            at = states_ptr + y[:, None] * X + (x0 + x)[None, :]
            S = tl.trans(tl.load(at, mask=mask_y[:, None] & mask_x[None, :], other=0.0))
        else:
            at = states_ptr + (x0 + x)[:, None] * Y + y[None, :]
            S = tl.load(at, mask=mask_x[:, None] & mask_y[None, :], other=0.0)
        o += dot(a, S)
    if DECAY != 0:
        o *= to_row[:, None]
    for x0 in tl.range(0, X, BX, num_stages=1):
        mask_x = x0 + x < X
        a = tl.load(a_ptr + r[:, None] * sat + (x0 + x)[None, :], mask=mask_r[:, None] & mask_x[None, :], other=0.0)
        if DECAY == 2:
            passed = below if REVERSE else below * 0.0
        for j0 in range(row if REVERSE else 0, n_valid if REVERSE else tl.minimum(row + BR, n_valid), BN):
            j = j0 + n
            mask_j = j < n_valid
            b = tl.load(b_ptr + j[:, None] * sbt + (x0 + x)[None, :], mask=mask_j[:, None] & mask_x[None, :], other=0.0)
            c = tl.load(c_ptr + j[:, None] * sct + y[None, :], mask=mask_j[:, None] & mask_y[None, :], other=0.0)
            A = dot(a, tl.trans(b))
            lag = (j[None, :] - r[:, None]) if REVERSE else (r[:, None] - j[None, :])
            if DECAY == 1:
                A *= tl.exp(g_head * tl.maximum(lag, 0).to(tl.float32))
            if DECAY == 2:
                g = tl.load(g_ptr + j * sgt, mask=mask_j, other=0.0)
                G = passed + tl.cumsum(g, 0)
                passed += tl.sum(g, 0)
                apart = (G[None, :] - G_row[:, None]) if REVERSE else (G_row[:, None] - G[None, :])
                A *= tl.exp(tl.minimum(apart, 0.0))
            A = tl.where(lag >= 0, A, 0.0)
            o += dot(A.to(c.dtype), c)
    out_ptr += ((i_b * T + t0) * H + i_h) * Y
    tl.store(
        out_ptr + r[:, None] * (H * Y) + y[None, :],
        (o * scale).to(out_ptr.dtype.element_ty),
        mask=mask_r[:, None] & mask_y[None, :],
    )


_outputs = Launcher(outputs_kernel)


class Wide:
    """One pass over wide heads: arguments as for `Sweep`, which walks through the states.

    walk, outputs: block shapes other than the table's.
    """

    def __init__(
        self, like: Operands, heads: int, *, scale: float = 1.0, reverse: bool = False, transposed: bool = False,
        whole: bool = False, walk: tuning.SweepConfig = tuning.STATES, outputs: tuning.OutputsConfig = tuning.OUTPUTS,
    ) -> None:  # fmt: skip
        self.sweep = Sweep(like, heads, reverse=reverse, transposed=transposed, whole=whole, config=walk, block=BLOCK)
        self.config = outputs
        self.scale = scale
        a = like.a
        packed = like.cu_seqlens is not None
        self.slots = chunk_slots(a.shape[1], sequence_count(a, like.cu_seqlens), a.shape[0], BLOCK, packed)
        self._launches: dict[bool, Launch] = {}

    def states(
        self, x: Operands, state: torch.Tensor | None, final: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The state that meets each block [slots, H, X, Y] in a's dtype, and the last state if wanted."""
        sweep = self.sweep
        into = x.a.new_empty((self.slots, sweep.heads, sweep.x, sweep.y))
        return into, sweep.walk(x, state, final, into)

    def outputs(self, x: Operands, states: torch.Tensor, exchanged: bool = False) -> torch.Tensor:
        """[B, T, H, Y] in a's dtype. exchanged: the states are those of the pass with keys and values exchanged."""
        sweep = self.sweep
        out = x.a.new_empty((sweep.batch, sweep.tokens, sweep.heads, sweep.y))
        if out.numel():
            launch = self._launches.get(exchanged)
            if launch is None:
                launch = self._launches[exchanged] = self._prepared(x, exchanged)
            launch(x.a, x.b, x.c, x.log_decay, states, out, x.cu_seqlens)
        return out

    def run(
        self, x: Operands, state: torch.Tensor | None, *, final: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs [B, T, H, Y] in a's dtype, and the last state if wanted."""
        states, last = self.states(x, state, final)
        return self.outputs(x, states), last

    def _prepared(self, x: Operands, exchanged: bool) -> Launch:
        a, b, c, g, sweep = x.a, x.b, x.c, x.log_decay, self.sweep
        align, strides = aligned_strides(a, b, c)
        heads = sweep.heads
        rows, width, columns, keys, warps, stages = self.config
        return Launch(
            _outputs,
            (self.slots * heads * (BLOCK // rows) * tuning.blocks(sweep.y, columns),), sweep.index,
            (
                sweep.tokens, sweep.sequences, heads,
                heads // a.shape[2], heads // b.shape[2], heads // c.shape[2],
                1 if g is None else heads // g.shape[-1], self.scale, *strides,
                *(g.stride() if g is not None and sweep.decay == 2 else (0, 0, 0)),
            ),
            (
                sweep.x, sweep.y, BLOCK, rows, width, columns, keys, sweep.decay, sweep.reverse,
                sweep.packed, exchanged, align,
            ),
            warps, stages,
        )  # fmt: skip
