"""One attention class for both modes and both kinds of layer; the view says what is seen."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import AttentionShape
from .linear import Linear
from .norm import RMSNorm
from .ranks import Ranks
from .rope import rotate
from .view import View


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values, and a softmax scale of 1.

    A full layer has no `v_proj`: its values are the raw output of `k_proj`, before key norm and rotary.
    """

    def __init__(self, hidden: int, shape: AttentionShape, eps: float):
        super().__init__()
        self.shape = shape
        self.ranks: Ranks | None = None
        width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Linear(hidden, width)
        self.k_proj = Linear(hidden, kv_width)
        self.v_proj = Linear(hidden, kv_width) if shape.sliding else None
        self.o_proj = Linear(width, hidden)
        self.q_norm = RMSNorm(shape.head_dim, eps)
        self.k_norm = RMSNorm(shape.head_dim, eps)
        self.v_norm = RMSNorm(shape.head_dim, eps, scaled=False)

    def forward(self, x: Tensor, view: View, layer: int) -> Tensor:
        """[B, S, H] -> [B, S, H]; `view` knows what came before and who may see whom."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        turn = view.rotation(self.shape, x.dtype)

        raw_keys = self.k_proj(x).view(heads)
        raw_values = raw_keys if self.v_proj is None else self.v_proj(x).view(heads)
        queries = rotate(self.q_norm(self.q_proj(x).view(heads)), turn).transpose(1, 2)
        keys = rotate(self.k_norm(raw_keys), turn).transpose(1, 2)
        values = self.v_norm(raw_values).transpose(1, 2)

        seen = view.attend(layer, self.shape, queries, keys, values)
        out: Tensor = self.o_proj(seen.transpose(1, 2).reshape(batch, length, -1))
        return out if self.ranks is None else self.ranks.total(out)
