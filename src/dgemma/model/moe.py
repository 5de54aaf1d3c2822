"""Mixture of experts: a router that picks k of E experts a token, and the experts, run grouped by expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels import cpu
from ..quant import Quantized
from .linear import Linear, linear
from .mlp import gated_gelu
from .norm import RMSNorm
from .ranks import Ranks
from .view import View

if TYPE_CHECKING:
    from .offload import ExpertStream


class Router(nn.Module):
    """Softmax over experts in float32, the k best renormalised to sum 1, then a scale of each expert's own."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k_experts
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, scaled=False)
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))

    def forward(self, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """x [T, H] -> weights [T, k] (float32 in float32 networks), experts [T, k] int64."""
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
        weights, experts = torch.topk(probabilities, self.top_k, dim=-1)
        view.observe_routing(probabilities, experts)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Experts(nn.Module):
    """E gated feed-forwards with fused weights: `gate_up_proj` [E, 2I, H] (gate rows first), `down_proj` [E, H, I].

    Of a network in parts, some of all experts. Where there is a stream, the weights are in host memory.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks | None = None):
        super().__init__()
        self.ranks = ranks
        self.stream: ExpertStream | None = None
        self.first, end = (0, config.num_experts) if ranks is None else ranks.experts
        count, hidden, width = end - self.first, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Sum over each token's k experts of weight times output: x [T, H], weights and experts [T, k] -> [T, H].

        The T * k assignments are sorted by expert, so that each expert's rows are one product and an expert
        without rows costs nothing.
        """
        if self.ranks is None:
            return self._own(x, weights, experts)
        # What chose another rank's expert goes to one of ours and counts nothing: correct, and of few rows the cost.
        here = experts - self.first
        ours = (here >= 0) & (here < self.gate_up_proj.shape[0])
        return self.ranks.total(self._own(x, torch.where(ours, weights, 0), torch.where(ours, here, 0)))

    def held(self) -> tuple[Tensor | Quantized, Tensor | Quantized]:
        """Both weights where the network is, until the next layer asks for its own. Once a forward."""
        return (self.gate_up_proj, self.down_proj) if self.stream is None else self.stream.lend(self)

    def _own(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        gate_up, down = self.held()
        if not isinstance(gate_up, Tensor) and not isinstance(down, Tensor) and x.device.type == "cpu":
            return cpu.experts(x, weights, experts, gate_up, down)
        tokens, k = experts.shape
        order = torch.argsort(experts.flatten(), stable=True)
        counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()
        rows = x.index_select(0, order // k).split(counts)
        outputs = [
            linear(gated_gelu(*linear(group, gate_up[index]).chunk(2, dim=-1)), down[index])
            for index, group in enumerate(rows)
            if len(group)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        by_token = torch.cat(outputs).index_select(0, back).view(tokens, k, -1)
        return (by_token * weights[..., None]).sum(dim=1).to(x.dtype)
