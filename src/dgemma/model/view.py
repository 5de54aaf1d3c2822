"""What a forward sees beside its own tokens: the cache of committed tokens, and the two views on it.

A layer asks its view three things: the rotation of its positions, what its queries see, and which of its two scalars
applies. The two modes differ in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import AttentionShape, ModelConfig
from .rope import Rotation, rotation


class Mode(Enum):
    """Encode is causal and writes the cache; denoise is bidirectional over a canvas and only reads it."""

    ENCODE = "encode"
    DENOISE = "denoise"


class Cache:
    """Keys and values of the committed tokens of B sequences of equal length.

    Full layers keep every entry, sliding layers the last `sliding_window - 1`: no later query sees more.
    Each tensor is [B, kv_heads, entries, head_dim].
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        self.window = config.sliding_window
        self.batch = batch
        self.length = 0
        empty = [torch.empty(batch, s.kv_heads, 0, s.head_dim, device=device, dtype=dtype) for s in config.layers]
        self.keys: list[Tensor] = list(empty)
        self.values: list[Tensor] = list(empty)

    def bytes(self) -> int:
        """Memory that the entries take."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class View(ABC):
    """One forward's surroundings.

    Fields:
        mode: which layer scalar applies.
        positions: of the forward's own tokens, [S] or [B, S].
    """

    mode: Mode

    def __init__(self, positions: Tensor):
        self.positions = positions
        self._rotations: dict[tuple[AttentionShape, torch.dtype], Rotation] = {}

    def rotation(self, shape: AttentionShape, dtype: torch.dtype) -> Rotation:
        """Cosines and sines of this forward's positions for layers of this shape, computed once."""
        key = (shape, dtype)
        if key not in self._rotations:
            self._rotations[key] = rotation(self.positions, shape, dtype)
        return self._rotations[key]

    def attend(self, layer: int, shape: AttentionShape, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of queries [B, heads, S, D] over all that they may see -> [B, heads, S, D]; the scale is 1."""
        keys, values, mask = self.extend(layer, shape, keys, values)
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=1.0, enable_gqa=shape.heads != shape.kv_heads
        )

    def choose(self, encode: Tensor, denoise: Tensor) -> Tensor:
        """The scalar that applies."""
        return encode if self.mode is Mode.ENCODE else denoise

    @abstractmethod
    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Own keys and values [B, kv_heads, S, D] -> all that the queries may see, and a mask (True: seen) or None."""

    def observe_routing(self, probabilities: Tensor, experts: Tensor) -> None:  # noqa: B027 - most views do not look
        """Told by each router: probabilities [T, E], chosen experts [T, k]. Training balances experts with it."""


class EncodeView(View):
    """Causal view that appends to a cache. Nothing is written before `commit`: a forward that fails loses nothing."""

    mode = Mode.ENCODE

    def __init__(self, cache: Cache, length: int, device: torch.device):
        super().__init__(torch.arange(cache.length, cache.length + length, device=device))
        self.cache = cache
        self._masks: dict[bool, Tensor] = {}
        self._new: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        keys = torch.cat([self.cache.keys[layer], keys], dim=2)
        values = torch.cat([self.cache.values[layer], values], dim=2)
        kept = self.cache.window - 1 if shape.sliding else keys.shape[2]
        first = max(0, keys.shape[2] - kept)
        self._new[layer] = (keys[:, :, first:], values[:, :, first:])
        return keys, values, self._mask(shape.sliding, keys.shape[2])

    def _mask(self, sliding: bool, entries: int) -> Tensor:
        """[S, entries]: a query at p sees keys in (p - window, p] when sliding, all up to p otherwise."""
        if sliding not in self._masks:
            queries = self.positions[:, None]
            end = self.cache.length + len(queries)
            keys = torch.arange(end - entries, end, device=queries.device)[None, :]
            seen = keys <= queries
            self._masks[sliding] = seen & (keys > queries - self.cache.window) if sliding else seen
        return self._masks[sliding]

    def commit(self) -> None:
        """Writes what the layers have appended."""
        for layer, (keys, values) in self._new.items():
            # `contiguous` copies a slice, so that the part outside the window is freed.
            self.cache.keys[layer] = keys.contiguous()
            self.cache.values[layer] = values.contiguous()
        self.cache.length += self.positions.shape[0]


class DenoiseView(View):
    """Bidirectional view of a canvas that follows the cache: no mask, and one window for the whole canvas.

    Sliding layers see the last `window - 1` committed entries, anchored at the canvas start: what the cache keeps.
    """

    mode = Mode.DENOISE

    def __init__(self, cache: Cache, length: int, device: torch.device):
        super().__init__(torch.arange(cache.length, cache.length + length, device=device))
        self.cache = cache

    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        keys = torch.cat([self.cache.keys[layer], keys], dim=2)
        values = torch.cat([self.cache.values[layer], values], dim=2)
        return keys, values, None
