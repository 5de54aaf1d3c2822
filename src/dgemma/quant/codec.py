"""Between `Quantized` and the tensors of a layout on disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from .layouts import GLOBAL, NVFP4, PACK, PACKED, SCALE, SECOND, SHAPE, WEIGHT, ZERO, Layout
from .quantized import Quantized


def decode(layout: Layout, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Quantized:
    """The matrix [O, I] that a layout's tensors stand for. Exact: its products value times scale are the layout's.

    Raises:
        CheckpointError: `weight_shape` says another shape, or a scale is not finite; begins with the part.
    """
    rows, width = shape
    if SHAPE in tensors and tensors[SHAPE].tolist() != [rows, width]:
        raise CheckpointError(f"{SHAPE} says {tensors[SHAPE].tolist()}; config.json says {[rows, width]}")
    scales, factors = tensors[SCALE], None
    if layout.nvfp4:
        data, factors = tensors[PACKED if layout.name == NVFP4 else WEIGHT], _factors(layout, tensors, rows)
    else:
        data = _unpacked(layout, tensors, shape) if layout.name == PACK else tensors[WEIGHT]
        scales = (scales.reshape(-1, 1) if scales.dim() < 2 else scales).float().expand(rows, -1).contiguous()
    if not bool(torch.isfinite(scales.float() * (1.0 if factors is None else factors)).all()):
        raise CheckpointError(f"{SCALE} holds NaN or infinity; the file is damaged")
    if data.dtype == torch.float8_e4m3fn and bool(torch.isnan(data.float()).any()):
        raise CheckpointError(f"{WEIGHT} holds NaN; the file is damaged")
    return Quantized(bits=layout.bits, group=layout.group, data=data.contiguous(), scales=scales, factors=factors)


def plain_part(layout: Layout) -> str | None:
    """The tensor whose bytes on disk are those of `Quantized.data`, if there is one (and no row is padded)."""
    if layout.name == PACK and layout.bits != 4:
        return None
    return PACKED if layout.name in (PACK, NVFP4) else WEIGHT


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


def _factors(layout: Layout, tensors: Mapping[str, Tensor], rows: int) -> Tensor:
    """Of NVFP4: half the matrix's own scale for each row, since `Quantized` has twice the values."""
    whole = tensors[GLOBAL].float().reciprocal() if layout.name == NVFP4 else tensors[SECOND].float()
    return (whole.reshape(1, 1) / 2).repeat(rows, 1)


def _nibbles(data: Tensor) -> Tensor:
    """The 4-bit values 0..15 of bytes [..., N] -> int8 [..., 2N]."""
    return torch.stack([data & 0xF, data >> 4], dim=-1).flatten(-2).to(torch.int8)
