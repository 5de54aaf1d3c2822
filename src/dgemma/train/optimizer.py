"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Moves all singular values of [..., M, N] near 1 by a quintic Newton-Schulz iteration.

    Coefficients: Jordan et al., "Muon" (2024). Works on a stack of matrices, as fused experts are.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for weights of two or more axes, the last two a matrix."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update. Its size is `lr * sqrt(max(1, rows / columns))` a singular direction."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[-2] / weight.shape[-1]) ** 0.5)


def make_optimizers(
    network: nn.Module, *, matrix_lr: float, vector_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for every matrix but the embedding table and the router; AdamW for those, norms and scalars."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in network.named_parameters():
        is_matrix = weight.ndim >= 2 and not name.startswith("embed_tokens") and "router" not in name
        (matrices if is_matrix else others).append(weight)
    return [
        Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
