"""The gated feed-forward that layers, experts and self-conditioning share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cpu
from .linear import Linear
from .ranks import Ranks


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`, GELU in its tanh approximation."""
    return cpu.gate(gate, up) if gate.device.type == "cpu" else F.gelu(gate, approximate="tanh") * up


class MLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, no biases: [..., H] -> [..., H]."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)
        self.ranks: Ranks | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))
        return out if self.ranks is None else self.ranks.total(out)
