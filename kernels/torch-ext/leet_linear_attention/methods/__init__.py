"""The named algorithms of the operator, one file each: for study and comparison beside the default kernels.

Every module named here has a `forward` with the arguments of `library.forward` (checked before) and imports nothing of
another algorithm. Names that end in `_triton` are GPU kernels, the others plain torch. An algorithm is a way to sum the
forward; the function it computes is one and the same, so gradients and decode steps are the default method's
(`default.py`).
"""

from __future__ import annotations

NAMES = (
    "vanilla",
    "causal_dot_product",
    "causal_dot_product_triton",
    "lightning",
    "block_based",
    "fleet",
    "fleet_triton",
    "recursion",
)
