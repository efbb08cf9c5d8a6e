"""Every decay formula of published models, each with its source.

A formula gives one `log_decay <= 0` per state head, as Python floats computed in double precision: a decay close to 1
(the last layers of MiniMax, the last heads of RetNet) is lost if it is rounded to 16 bits, or in float32 before the
logarithm is taken. H is the number of heads, L of layers; head h and layer l count from 0.
"""

from __future__ import annotations

import math

LogDecays = tuple[float, ...]


def power_slopes(heads: int) -> tuple[float, ...]:
    """`2^(-8 (h + 1) / H)`, whatever H: transformers' `MiniMaxLightningAttention.get_slope_rate`."""
    return tuple(2.0 ** (-8 * (h + 1) / heads) for h in range(heads))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """ALiBi slopes (Press et al., "Train Short, Test Long", arXiv 2108.12409, and its released code).

    The power formula where H is a power of two; otherwise the slopes of the next lower power of two n, then every
    second slope of 2n.
    """
    lower = 1 << (heads.bit_length() - 1)
    if lower == heads:
        return power_slopes(heads)
    return power_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def minimax(heads: int, layer: int, layers: int) -> LogDecays:
    """`-2^(-8 (h + 1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)`: transformers' `MiniMaxLightningAttention`."""
    depth = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return tuple(-slope * depth for slope in power_slopes(heads))


def minimax_text_01(heads: int, layer: int, layers: int) -> LogDecays:
    """`-alibi_h * (1 - l / (L - 1) + 1e-5)`: the repository of MiniMax-Text-01 (`modeling_minimax_text_01.py`).

    L must be at least 2, as there.
    """
    if layers < 2:
        raise ValueError(f"layers is {layers}, must be at least 2: the formula divides by L - 1")
    depth = 1 - layer / (layers - 1) + 1e-5
    return tuple(-slope * depth for slope in alibi_slopes(heads))


def bailing(heads: int, layer: int, layers: int) -> LogDecays:
    """`-alibi_h * (1 - (l - 1) / (L - 1) + 1e-5)`: Ring / Ling linear as published (`modeling_bailing_moe_v2_5.py`).

    Some serving engines have l where this has l - 1. L must be at least 2, as there.
    """
    if layers < 2:
        raise ValueError(f"layers is {layers}, must be at least 2: the formula divides by L - 1")
    depth = 1 - (layer - 1) / (layers - 1) + 1e-5
    return tuple(-slope * depth for slope in alibi_slopes(heads))


def retnet(heads: int) -> LogDecays:
    """`log(1 - 2^(-5 - h))`: Sun et al., "Retentive Network", arXiv 2307.08621, and torchscale.

    By log1p: in float32, `1 - 2^(-5 - h)` is exactly 1 from head 20 on.
    """
    return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(heads))


def retnet_language_model(heads: int) -> LogDecays:
    """`log(1 - exp(linspace(log 1/32, log 1/512, H)))`: the HF port of RetNet with `use_lm_decay` (syncdoth/RetNet)."""
    first, last = math.log(1 / 32), math.log(1 / 512)
    step = (last - first) / max(heads - 1, 1)
    return tuple(math.log1p(-math.exp(first + h * step)) for h in range(heads))


def alibi(heads: int) -> LogDecays:
    """`-alibi_h` in every layer: MiniCPM-SALA (`modeling_minicpm_sala.py`), HypeNet (hybrid-linear-attention)."""
    return tuple(-slope for slope in alibi_slopes(heads))
