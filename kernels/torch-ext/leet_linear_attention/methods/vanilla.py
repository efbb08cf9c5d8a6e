"""Vanilla: the sum written out as attention with a decay mask instead of a softmax.

    o = (mask * (q k^T)) v        mask_ti = exp(G_t - G_i) for i <= t, else 0        G: running sum of log_decay

Katharopoulos et al., "Transformers are RNNs" (arXiv:2006.16236) without and Sun et al., "Retentive Network"
(arXiv:2307.08621) with decay call it the parallel form. 2 T^2 (K + V) flops and T^2 scores in memory per head, half
of them for pairs that the mask drops: large products that wait for nothing, right for short sequences only.
"""

from __future__ import annotations

from torch import Tensor

from .decay import Decay
from .sequences import operator_of


def _vanilla(
    q: Tensor, k: Tensor, v: Tensor, decay: Decay, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    tokens = q.shape[2]
    o = (q @ k.transpose(-1, -2)).mul_(decay.pairs(0, tokens)) @ v
    if state is not None:
        o += (q * decay.from_start(0, tokens)) @ state
    if not final:
        return o, None
    last = (k * decay.to_end(0, tokens)).transpose(-1, -2) @ v
    return o, last if state is None else last + decay.state_after(state, 0, tokens)


forward = operator_of(_vanilla)
