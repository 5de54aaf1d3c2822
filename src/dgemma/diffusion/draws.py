"""Where random numbers come from: torch's global generator in the reference's order, or counters."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Draws(Protocol):
    """The three random things that a canvas needs. `canvas` counts canvases from 0, `step` steps from 1."""

    def start(self, canvas: int, rows: int, length: int, vocabulary: int) -> Tensor:
        """A canvas of uniform tokens [B, L]."""

    def sample(self, canvas: int, step: int, processed: Tensor) -> Tensor:
        """One token a position from softmax(processed) [B, L, V] -> [B, L]."""

    def renoise(self, canvas: int, step: int, rows: int, length: int, vocabulary: int) -> Tensor:
        """Uniform tokens [B, L] for the positions that were not accepted."""


class GlobalDraws:
    """Draws from torch's global generator exactly as transformers does: the same seed gives the same tokens."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = device

    def start(self, canvas: int, rows: int, length: int, vocabulary: int) -> Tensor:
        return torch.randint(0, vocabulary, (rows, length), device=self.device)

    def sample(self, canvas: int, step: int, processed: Tensor) -> Tensor:
        probabilities = torch.softmax(processed, dim=-1, dtype=torch.float32)
        return torch.multinomial(probabilities.flatten(0, 1), num_samples=1).view(processed.shape[:2])

    def renoise(self, canvas: int, step: int, rows: int, length: int, vocabulary: int) -> Tensor:
        return self.start(canvas, rows, length, vocabulary)


class CounterDraws:
    """Every number is a function of (a row's seed, canvas, step, position) alone (Philox, Salmon et al. 2011).

    So a request gives the same tokens alone or in a batch. Samples are taken by inverting the cumulative
    distribution: one uniform number a position.
    """

    NOISE, SAMPLE = 0, 1

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu"):
        self.seeds = seeds
        self.device = device

    def uniform(self, canvas: int, step: int, purpose: int, length: int) -> Tensor:
        """[B, L] float64 in [0, 1); a position's number does not depend on the length."""
        rows = []
        for seed in self.seeds:
            counter = (purpose << 192) | (canvas << 160) | (step << 128)
            generator = np.random.Generator(np.random.Philox(key=seed % 2**64, counter=counter))
            rows.append(generator.random(length))
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def start(self, canvas: int, rows: int, length: int, vocabulary: int) -> Tensor:
        return self.renoise(canvas, 0, rows, length, vocabulary)

    def sample(self, canvas: int, step: int, processed: Tensor) -> Tensor:
        targets = self.uniform(canvas, step, self.SAMPLE, processed.shape[1])
        cumulative = torch.softmax(processed, dim=-1, dtype=torch.float32).cumsum(dim=-1)
        total = cumulative[..., -1:]
        # Strictly below the total: rounding must not carry a target past the last word that has a probability.
        below = torch.nextafter(total, torch.zeros_like(total))
        targets = torch.minimum(targets.to(total.dtype)[..., None] * total, below)
        return torch.searchsorted(cumulative, targets, right=True)[..., 0]

    def renoise(self, canvas: int, step: int, rows: int, length: int, vocabulary: int) -> Tensor:
        assert rows == len(self.seeds)
        return (self.uniform(canvas, step, self.NOISE, length) * vocabulary).long()
