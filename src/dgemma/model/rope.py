"""Rotary positions, rotate-half form: all dimensions in sliding layers, the first quarter's pairs in full layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import AttentionShape

Rotation = tuple[Tensor, Tensor]


def inverse_frequencies(shape: AttentionShape, device: torch.device | str = "cpu") -> Tensor:
    """Angle a position turns each pair of dimensions by, [head_dim / 2] float32.

    `theta^(-2i / head_dim)` for the first `rotary_fraction * head_dim / 2` pairs, zero for the rest
    (the "proportional" kind of the full layers; sliding layers have a fraction of 1).
    """
    rotating = int(shape.rotary_fraction * shape.head_dim // 2)
    exponents = torch.arange(0, 2 * rotating, 2, dtype=torch.float32, device=device) / shape.head_dim
    turning = 1.0 / (shape.theta**exponents)
    return torch.cat([turning, turning.new_zeros(shape.head_dim // 2 - rotating)])


def rotation(positions: Tensor, shape: AttentionShape, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for positions [S] or [B, S]: two tensors [S, D] or [B, S, 1, D], ready to multiply with
    [B, S, heads, D]. Angles are float32; the result has the network's dtype, as in the reference.
    """
    angles = positions[..., None].float() * inverse_frequencies(shape, positions.device)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turns x [B, S, heads, D]: pairs are (i, i + D/2)."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
