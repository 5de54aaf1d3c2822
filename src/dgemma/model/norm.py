"""RMSNorm, computed in float32 whatever the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import cpu, reference


class RMSNorm(nn.Module):
    """`x * (mean(x²) + eps)^-0.5`, times `weight` directly (not 1 + weight) when it has one.

    Args:
        dim: width of the last axis.
        eps: added to the mean square.
        scaled: whether there is a weight.
    """

    def __init__(self, dim: int, eps: float, *, scaled: bool = True):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis: [..., dim] -> [..., dim], same dtype."""
        return (cpu if x.device.type == "cpu" else reference).norm(x, self.weight, self.eps)
