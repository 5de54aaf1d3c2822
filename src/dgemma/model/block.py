"""One layer: attention, then a dense MLP and a mixture of experts side by side, with norms around each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import Attention
from .mlp import MLP
from .moe import Experts, Router
from .norm import RMSNorm
from .ranks import Ranks
from .view import View


class Block(nn.Module):
    """The layer of model.md; encode and denoise share everything but the scalar at the end.

    ```
    h   = x + post_attention_layernorm(attention(input_layernorm(x)))
    a   = post_feedforward_layernorm_1(mlp(pre_feedforward_layernorm(h)))
    b   = post_feedforward_layernorm_2(experts(pre_feedforward_layernorm_2(h), router(h)))
    out = (h + post_feedforward_layernorm(a + b)) * scalar
    ```
    """

    def __init__(self, config: ModelConfig, index: int, ranks: Ranks | None = None):
        super().__init__()
        self.index = index
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(hidden, config.layers[index], eps)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config, ranks)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.encode_scalar = nn.Parameter(torch.ones(1))
        self.denoise_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, view: View) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), view, self.index))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        flat = h.flatten(0, 1)
        weights, experts = self.router(flat, view)
        mixed = self.experts(self.pre_feedforward_layernorm_2(flat), weights, experts).view_as(h)
        mixed = self.post_feedforward_layernorm_2(mixed)
        scalar = view.choose(self.encode_scalar, self.denoise_scalar)
        return (h + self.post_feedforward_layernorm(dense + mixed)) * scalar
