"""Projections whose initial weights depend on the depth of the model."""

from __future__ import annotations

from torch import nn


class ScaledLinear(nn.Linear):
    """One of those that DeepNorm and Sub-LN scale by `RetNetConfig.init_scale`: values, outputs, the MLP's activated
    and last one, as torchscale does (`v_proj`, `out_proj`, `fc1`, `fc2`)."""
