"""Self-conditioning: the canvas's embeddings plus what the previous step believed (denoise only)."""

from __future__ import annotations

from torch import Tensor

from ..config import ModelConfig
from .mlp import MLP
from .norm import RMSNorm


class SelfConditioning(MLP):
    """`norm(e + ffn(pre_norm(soft)))`, the last norm without weight."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, scaled=False)

    def condition(self, embeddings: Tensor, soft: Tensor | None) -> Tensor:
        """Embeddings and soft embeddings [B, L, H] -> input of the first layer.

        `None` stands for the zero vector of a canvas's first step, whose feed-forward is exactly zero.
        """
        if soft is not None:
            embeddings = embeddings + self(self.pre_norm(soft))
        return self.post_norm(embeddings)
