"""The vocabulary's cross-entropy in tiles: the same figure as `cross_entropy(network.logits(hidden))`, without ever
holding all logits or their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 1024  # rows of one tile: [1024, 4096] float32 is 16 MB


def cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of soft-capped scores.

    Args:
        hidden: [N, H]; table: [V, H]; targets: [N] int64; weights: [N] float32; cap: the soft-cap.

    Returns:
        The sum (differentiable in hidden and table), and which rows guess their target [N] bool.
    """
    return _CrossEntropy.apply(hidden, table, targets, weights, cap)


class _CrossEntropy(torch.autograd.Function):
    """Forward makes the gradients too, tile by tile, while the scores are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, cap: float
    ) -> tuple[Tensor, Tensor]:
        total = hidden.new_zeros(())
        hidden_grad, table_grad = torch.empty_like(hidden), torch.zeros_like(table)
        right = []
        for first in range(0, len(hidden), ROWS):
            rows = slice(first, first + ROWS)
            loss, grad, hit = _tile(hidden[rows] @ table.T, targets[rows], weights[rows], cap)
            total += loss
            right.append(hit)
            torch.mm(grad, table, out=hidden_grad[rows])
            table_grad.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(hidden_grad, table_grad)
        hits = torch.cat(right) if right else targets.bool()
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, table_grad = ctx.saved_tensors
        return hidden_grad * upstream[0], table_grad * upstream[0], None, None, None


def _tile(scores: Tensor, targets: Tensor, weights: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the loss by the raw scores [n, V], and hits [n]."""
    squashed = torch.tanh(scores / cap)
    capped = squashed * cap
    normalizer = torch.logsumexp(capped, dim=-1, keepdim=True)
    chosen = capped.gather(1, targets[:, None])
    wanted = (torch.arange(scores.shape[1], device=scores.device)[None, :] == targets[:, None]).float()
    grad = (torch.exp(capped - normalizer) - wanted) * weights[:, None] * (1 - squashed * squashed)
    return ((normalizer - chosen)[:, 0] * weights).sum(), grad, capped.amax(dim=-1) <= chosen[:, 0]


def compile_tiles() -> None:
    """Fuses the elementwise passes over a tile with torch's compiler (needs a C++ compiler on a CPU)."""
    global _tile
    _tile = torch.compile(_tile, dynamic=True)
