"""Between `Quantized` and the tensors of a layout on disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from .layouts import FLOAT, GLOBAL, INT, MODELOPT, NVFP4, PACK, PACKED, SCALE, SECOND, SHAPE, WEIGHT, ZERO, Layout
from .quantized import Quantized

# Twice the value of each E2M1 code: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the same below zero.
_E2M1_TWICE = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)


def decode(layout: Layout, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
    """The matrix [O, I] that a layout's tensors stand for. Exact: its products value times scale are the layout's.

    Raises:
        CheckpointError: `weight_shape` says another shape, or a scale is not finite; begins with the part.
    """
    rows, width = shape
    if SHAPE in tensors and tensors[SHAPE].tolist() != [rows, width]:
        raise CheckpointError(f"{SHAPE} says {tensors[SHAPE].tolist()}; config.json says {[rows, width]}")
    scales = tensors[SCALE].float().reshape(-1, 1) if tensors[SCALE].dim() < 2 else tensors[SCALE].float()
    if layout.name in (NVFP4, MODELOPT):
        data, scales = _nvfp4(layout, tensors, scales)
    elif layout.name == PACK:
        data = _unpacked(layout, tensors, shape)
    else:
        data = tensors[WEIGHT]
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{SCALE} holds NaN or infinity; the file is damaged")
    if data.dtype == torch.float8_e4m3fn and bool(torch.isnan(data.float()).any()):
        raise CheckpointError(f"{WEIGHT} holds NaN; the file is damaged")
    scales = scales.expand(rows, -1).contiguous()
    return Quantized(bits=layout.bits, group=layout.group, data=data.contiguous(), scales=scales)


def plain_part(layout: Layout) -> str | None:
    """The tensor whose bytes on disk are those of `Quantized.data`, if there is one (and no row is padded)."""
    if layout.name == PACK:
        return PACKED if layout.bits == layout.stored_bits == 4 else None
    return WEIGHT if layout.name in (INT, FLOAT) else None


def encode(layout: Layout, matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of a matrix [O, I] by part, as `layout.headers` announces them."""
    scale = matrix.scales.to(torch.bfloat16)
    if layout.name != PACK:
        return {WEIGHT: matrix.data, SCALE: scale}
    data = matrix.data if matrix.bits == 4 else (matrix.data.view(torch.uint8) ^ 0x80)
    data = F.pad(data, (0, -data.shape[-1] % 4)).contiguous()
    return {PACKED: data.view(torch.int32), SCALE: scale, SHAPE: torch.tensor(matrix.shape)}


def _unpacked(layout: Layout, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Values of pack-quantized, as `Quantized.data` holds them."""
    rows, width = shape
    data = tensors[PACKED].view(torch.uint8)[:, : width * layout.stored_bits // 8]
    if layout.stored_bits == 8:
        return (data ^ 0x80).view(torch.int8)
    if ZERO not in tensors:
        return data
    # Zero points are packed along the rows: [O/8, G] words.
    zeros = _nibbles(tensors[ZERO].t().contiguous().view(torch.uint8))[:, :rows].t()
    values = _nibbles(data).unflatten(-1, (-1, layout.group or width))
    return (values - zeros[..., None]).flatten(-2)


def _nvfp4(layout: Layout, tensors: Mapping[str, Tensor], scales: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the values as int8, and half the scales."""
    packed = tensors[PACKED if layout.name == NVFP4 else WEIGHT]
    whole = tensors[GLOBAL].float().reciprocal() if layout.name == NVFP4 else tensors[SECOND].float()
    pairs = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return _E2M1_TWICE[pairs.int()], scales * (whole.reshape(()) / 2)


def _nibbles(data: Tensor) -> Tensor:
    """The 4-bit values 0..15 of bytes [..., N] -> int8 [..., 2N]."""
    return torch.stack([data & 0xF, data >> 4], dim=-1).flatten(-2).to(torch.int8)
