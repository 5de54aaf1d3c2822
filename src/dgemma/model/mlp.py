"""The gated feed-forward that layers, experts and self-conditioning share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, GELU in its tanh approximation."""
    return F.gelu(gate, approximate="tanh") * up


class MLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, no biases: [..., H] -> [..., H]."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))
