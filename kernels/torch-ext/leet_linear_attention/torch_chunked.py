"""Decayed linear attention, chunkwise in plain torch: any device, fp32 / bf16 / fp16 (computed in fp32) and float64.

Inside a chunk the pairs are a small masked product; between chunks the state is carried. With G the running sum of
log_decay inside a chunk and S the state entering it (the block form of Lightning Attention-2, arXiv:2401.04658, and of
Mamba-2, arXiv:2405.21060, with the general decay of the latter),

    o_t = scale * (sum_{i <= t} e^{G_t - G_i} (q_t . k_i) v_i  +  e^{G_t} q_t S)
    S'  = e^{G_end} S + sum_i e^{G_end - G_i} k_i v_i^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_rows
from .chunking import Chunking, Scratch
from .decay_factors import ChunkDecay, DecayFactors
from .methods import vanilla
from .precision import full_precision
from .shapes import state_heads

# Up to here all pairs at once take fewer calls than chunks and states do.
ONE_BLOCK = 128


def _accumulate_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _heads(x: Tensor, heads: int) -> Tensor:
    """`x` `[n, B, h, ...]` with every head repeated to `heads` in all."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


class _Problem:
    """The arguments, cut into chunks: what forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.initial_state, self.scale = q, k, v, initial_state, scale
        self.batch, self.tokens = q.shape[:2]
        self.heads = state_heads(q, k, v, log_decay, initial_state)
        self.dtype = _accumulate_dtype(q)
        self.chunking = Chunking(self.tokens, cu_seqlens, q.device)
        self.state_shape = (self.heads, k.shape[-1], v.shape[-1])
        self.decay = DecayFactors(log_decay, self.heads, self.chunking, self.dtype)
        self.scratch = Scratch(self.dtype, q.device)

    def segments(self) -> list[tuple[int, int]]:
        c = self.chunking.chunk
        _, key_dim, value_dim = self.state_shape
        return self.chunking.segments(
            self.batch * self.heads * max(c * c, c * key_dim, c * value_dim, key_dim * value_dim)
        )

    def carry(self, given: Tensor | None) -> Tensor:
        """The state carried into the first (or last) segment: the one given; with packing sequences bring their own."""
        if given is not None and not self.chunking.packed:
            return given.to(self.dtype)
        return torch.zeros((self.batch, *self.state_shape), dtype=self.dtype, device=self.q.device)

    def take(self, name: str, x: Tensor, lo: int, hi: int) -> Tensor:
        batch, _, heads, width = x.shape
        return self.chunking.take(x, lo, hi, self.scratch(name, hi - lo, batch, heads, self.chunking.chunk, width))

    def take_query(self, lo: int, hi: int) -> Tensor:
        q = self.take("q", self.q, lo, hi)
        return q if self.scale == 1.0 else q.mul_(self.scale)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right`, both `[n, B, H, ...]`."""
        out = self.scratch(name, *left.shape[:-1], right.shape[-1])
        torch.bmm(left.flatten(0, 2), right.flatten(0, 2), out=out.flatten(0, 2))
        return out

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q . k of every pair in a chunk, `[n, B, H, c, c]`; heads that share both are computed once."""
        heads = max(q.shape[2], k.shape[2])
        if heads % q.shape[2] or heads % k.shape[2]:
            heads = self.heads
        return _heads(self.product("scores", _heads(q, heads), _heads(k, heads).transpose(-1, -2)), self.heads)

    def states(self, k: Tensor, v: Tensor, decay: ChunkDecay, carry: Tensor, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The states entering each chunk and after each, `[n, B, H, K, V]`, from k times decay.key and v of H heads."""
        chunks = self.updates("states", k, v, carry)
        return self.chunking.scan(chunks, decay.whole, self.initial_state, lo, hi), chunks[1:]

    def updates(self, name: str, left: Tensor, right: Tensor, carry: Tensor, reverse: bool = False) -> Tensor:
        """`left^T @ right` of every chunk, `[n + 1, B, H, K, V]`, with `carry` in the slot before them (or after)."""
        n = left.shape[0]
        out = self.scratch(name, n + 1, self.batch, *self.state_shape)
        out[n if reverse else 0].copy_(carry)  # first: it may lie in a slot of this buffer
        updates = out[:-1] if reverse else out[1:]
        torch.bmm(left.flatten(0, 2).transpose(1, 2), right.flatten(0, 2), out=updates.flatten(0, 2))
        return out


@full_precision
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Outputs `[B, T, H, V]` in q's dtype and, if asked for, final states `[B or N, H, K, V]`.

    q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, log_decay None, `[H]` or `[B, T, H]`. States are float32,
    float64 for float64 inputs. Arguments are taken as checked.
    """
    heads = state_heads(q, k, v, log_decay, initial_state)
    if cu_seqlens is None and q.shape[1] <= ONE_BLOCK:
        return vanilla.forward(q, k, v, log_decay, initial_state, cu_seqlens, scale, output_final_state)
    if torch_rows.serves(q, v, heads, cu_seqlens):
        return _forward_rows(q, k, v, log_decay, initial_state, heads, scale, output_final_state)
    p = _Problem(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    cut = p.chunking
    out = cut.empty(p.batch, p.heads, v.shape[-1], q.dtype)
    carry = p.carry(initial_state)
    ends = cut.ends(initial_state, p.state_shape, p.dtype) if output_final_state and cut.packed else None
    for lo, hi in p.segments():
        qc, kc, vc = p.take_query(lo, hi), p.take("k", k, lo, hi), p.take("v", v, lo, hi)
        decay = p.decay.of(lo, hi)
        weights = p.scores(qc, kc).mul_(decay.pair)
        qc, kc, vc = (_heads(x, p.heads) for x in (qc, kc, vc))
        # Chunks are copies, no longer needed as they were: they are scaled in place.
        entering, after = p.states(kc.mul_(decay.key), vc, decay, carry, lo, hi)
        oc = p.product("o", weights, vc)
        oc.flatten(0, 2).baddbmm_(qc.mul_(decay.query).flatten(0, 2), entering.flatten(0, 2))
        cut.put(out, oc, lo, hi)
        carry = after[-1]
        if ends is not None:
            cut.put_ends(ends, after, lo, hi)
    if not output_final_state:
        return cut.trim(out), None
    return cut.trim(out), carry.clone() if ends is None else ends[:-1]


def _forward_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    heads: int,
    scale: float,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = _accumulate_dtype(q)
    cut = Chunking(q.shape[1], None, q.device, longest=torch_rows.CHUNK)
    out = cut.empty(q.shape[0], heads, v.shape[-1], q.dtype)
    if initial_state is None:
        state = torch.zeros((q.shape[0], heads, k.shape[-1], v.shape[-1]), dtype=dtype, device=q.device)
    else:
        state = initial_state.to(dtype, copy=True, memory_format=torch.contiguous_format)
    decay = DecayFactors(log_decay, heads, cut, dtype)
    torch_rows.forward_rows(q, k, v, state, initial_state is None, decay, cut, scale, out)
    return out, state if output_final_state else None


@full_precision
def backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    need_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients `(dq, dk, dv, dlog_decay | None, dinitial_state | None)`, each with its argument's shape and dtype.

    With R the gradient of the state leaving a chunk and W_ti = e^{G_t - G_i} scale (q_t . k_i)(do_t . v_i):

        dq_t = scale (sum_{i <= t} e^{G_t - G_i} (do_t . v_i) k_i  +  e^{G_t} S do_t)
        dk_i = sum_{t >= i} e^{G_t - G_i} scale (do_t . v_i) q_t   +  e^{G_end - G_i} R v_i
        dv_i = sum_{t >= i} e^{G_t - G_i} scale (q_t . k_i) do_t   +  e^{G_end - G_i} R^T k_i
        R'   = e^{G_end} R + scale sum_t e^{G_t} q_t do_t^T
        dlog_decay_s = every term whose decay passes s: sum_{i < s <= t} W_ti and likewise for S and R

    The last sums only what decays past s. The shorter q.dq - k.dk also holds the terms i = t, which cancel on paper
    only.
    """
    p = _Problem(q, k, v, log_decay, initial_state, cu_seqlens, scale)
    cut = p.chunking
    segments = p.segments()

    carries = [p.carry(initial_state)]
    for lo, hi in segments[:-1]:
        kc, vc = (_heads(p.take(name, x, lo, hi), p.heads) for name, x in (("k", k), ("v", v)))
        decay = p.decay.of(lo, hi)
        carries.append(p.states(kc.mul_(decay.key), vc, decay, carries[-1], lo, hi)[1][-1].clone())

    dq, dk, dv = (cut.empty(p.batch, x.shape[2], x.shape[3], x.dtype) for x in (q, k, v))
    dlog = _LogDecayGradient(p, log_decay) if need_log_decay and log_decay is not None else None
    reach = p.carry(dfinal)
    begins = cut.ends(dfinal, p.state_shape, p.dtype) if initial_state is not None and cut.packed else None
    for (lo, hi), carry in zip(reversed(segments), reversed(carries), strict=False):
        qc, doc = p.take_query(lo, hi), p.take("do", do, lo, hi)
        kc, vc = p.take("k", k, lo, hi), p.take("v", v, lo, hi)
        decay = p.decay.of(lo, hi)
        scores = p.scores(qc, kc).mul_(decay.pair)
        qc, kc, vc = (_heads(x, p.heads) for x in (qc, kc, vc))
        keys = kc * decay.key
        entering, _ = p.states(keys, vc, decay, carry, lo, hi)
        buffer = p.updates("reach", qc * decay.query, doc, reach, reverse=True)
        leaving = cut.scan(buffer, decay.whole, dfinal, lo, hi, reverse=True)

        products = p.product("products", doc, vc.transpose(-1, -2))
        if dlog is not None:
            dlog.add_pairs(scores * products, lo, hi)
        products.mul_(decay.pair)
        dq_chunks = p.product("dq", doc, entering.transpose(-1, -2)).mul_(decay.query)
        dk_chunks = p.product("dk", vc, leaving.transpose(-1, -2)).mul_(decay.key)
        if dlog is not None:
            dlog.add_states(
                (qc * dq_chunks).sum(-1),
                (kc * dk_chunks).sum(-1),
                decay.whole[..., 0, 0] * (entering * leaving).sum((-1, -2)),
            )
            dlog.put(lo, hi)
        dq_chunks.flatten(0, 2).baddbmm_(products.flatten(0, 2), kc.flatten(0, 2))
        cut.put(dq, dq_chunks.mul_(scale), lo, hi)
        dk_chunks.flatten(0, 2).baddbmm_(products.flatten(0, 2).transpose(1, 2), qc.flatten(0, 2))
        cut.put(dk, dk_chunks, lo, hi)
        dv_chunks = p.product("dv", keys, leaving)
        dv_chunks.flatten(0, 2).baddbmm_(scores.flatten(0, 2).transpose(1, 2), doc.flatten(0, 2))
        cut.put(dv, dv_chunks, lo, hi)
        reach = buffer[0]
        if begins is not None:
            cut.put_ends(begins, buffer[:-1], lo, hi, reverse=True)
    dinitial = None
    if initial_state is not None:
        dinitial = reach.clone() if begins is None else begins[:-1]
    return cut.trim(dq), cut.trim(dk), cut.trim(dv), None if dlog is None else dlog.result(), dinitial


class _LogDecayGradient:
    """Sums the gradient of log_decay: per token the terms that decay past it, per head those of all tokens."""

    def __init__(self, problem: _Problem, log_decay: Tensor) -> None:
        self.p = problem
        self.like = log_decay
        self.per_token = log_decay.dim() == 3
        groups = log_decay.shape[-1]
        if self.per_token:
            self.out = problem.chunking.empty(problem.batch, groups, 1, log_decay.dtype)
            ones = torch.ones(problem.chunking.steps.shape, dtype=problem.dtype, device=log_decay.device)
            self.from_here, self.before = ones.triu(), ones.tril(-1)
        else:
            self.out = torch.zeros(groups, dtype=torch.float64, device=log_decay.device)

    def add_pairs(self, pairs: Tensor, lo: int, hi: int) -> None:
        """pairs `[n, B, H, c, c]`: W of query t (row) and key i."""
        if self.per_token:
            self.chunk = (self.from_here @ pairs).mul_(self.before).sum(-1, keepdim=True)
        else:
            self._add_per_head((pairs.sum((0, 1), dtype=torch.float64) * self.p.chunking.steps).sum((-1, -2)))
        self.bounds = (lo, hi)

    def add_states(self, queries: Tensor, keys: Tensor, through: Tensor) -> None:
        """Terms of queries and the entering state, keys and the leaving `[n, B, H, c]`, both states `[n, B, H]`."""
        if self.per_token:
            self.chunk += self.from_here @ queries.unsqueeze(-1)
            self.chunk += self.before @ keys.unsqueeze(-1)
            self.chunk += through[..., None, None]
            return
        lo, hi = self.bounds
        wide = torch.float64
        self._add_per_head((queries.sum((0, 1), dtype=wide) * (self.p.chunking.rows + 1)).sum(-1))
        self._add_per_head((keys.sum(1, dtype=wide) * self.p.chunking.remaining(lo, hi)[:, None]).sum((0, -1)))
        self._add_per_head((through.sum(1, dtype=wide) * self.p.chunking.lengths[lo:hi, None]).sum(0))

    def _add_per_head(self, terms: Tensor) -> None:
        self.out += terms.view(self.out.numel(), -1).sum(-1)

    def put(self, lo: int, hi: int) -> None:
        if self.per_token:
            self.p.chunking.put(self.out, self.chunk, lo, hi)

    def result(self) -> Tensor:
        if self.per_token:
            return self.p.chunking.trim(self.out).squeeze(-1)
        return self.out.to(self.like.dtype)
