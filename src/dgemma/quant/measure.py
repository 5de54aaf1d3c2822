"""How far rounded weights are from the ones that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantized import Quantized


@dataclass
class ErrorSum:
    """Sums over the weights seen so far.

    Fields:
        weights: how many.
        error, size: sums of squared differences and of squared weights.
        nbytes: on disk, scales included.
    """

    weights: int = 0
    error: float = 0.0
    size: float = 0.0
    nbytes: int = 0

    def add(self, weight: Tensor, rounded: Quantized, nbytes: int) -> None:
        """Counts one matrix [O, I] that takes so many bytes on disk."""
        weight = weight.float()
        self.weights += weight.numel()
        self.size += float(weight.square().sum(dtype=torch.float64))
        self.error += float((weight - rounded.dequantize()).square_().sum(dtype=torch.float64))
        self.nbytes += nbytes

    @property
    def relative(self) -> float:
        """Root of the mean squared error, over that of the mean squared weight."""
        return math.sqrt(self.error / self.size) if self.size else 0.0

    @property
    def bits(self) -> float:
        """Bits a weight on disk."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0
