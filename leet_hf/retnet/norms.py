"""Norms of RetNet: computed in float32 (float64 for float64) whatever the model's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused.norm import rms_norm, way_of


class RetNetRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim. affine: whether there is a weight."""

    def __init__(self, dim: int, eps: float, affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.dim and way_of("auto", x.dtype, x, self.weight) != "torch":
            return rms_norm(x, self.weight, eps=self.eps, each=False)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(wide)
        return F.rms_norm(x.to(wide), (self.dim,), weight, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


class RetNetLayerNorm(nn.LayerNorm):
    """LayerNorm over the last dim. affine: whether there are a weight and a bias."""

    def __init__(self, dim: int, eps: float, affine: bool = True) -> None:
        super().__init__(dim, eps, affine)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[RetNetRMSNorm] | type[RetNetLayerNorm]] = {"rmsnorm": RetNetRMSNorm, "layernorm": RetNetLayerNorm}
