"""Weights laid out for the compiled kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import Quantized
from . import native

# Of what is kept on disk: changes with the layout, and with what loading makes of a weight on the way to it.
LAYOUT = 1
LANES, CHUNK = 16, 32  # outputs of a tile, inputs of a chunk: csrc/kernels.h
MOST_INPUTS = 1 << 16  # with which 32 bits hold every sum


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """One matrix [O, I], or E of them [E, O, I], in tiles of 16 outputs and 32 inputs (csrc/dgemma_cpu.h).

    Outputs are filled up to 16 and inputs to 32 with zeros. The layout is the same on every processor, so it may be
    written to disk and mapped from there.

    Fields:
        bits, group: as in `Quantized`; groups are multiples of 32, or those of NVFP4.
        shape: (O, I) or (E, O, I).
        data: uint8, [E, tiles, bytes of a tile].
        scales: float32, in NVFP4 float8_e4m3fn [E, tiles, groups, 16].
        factors: NVFP4: float32 [E, tiles, 16]; otherwise None.
    """

    bits: int
    group: int | None
    shape: tuple[int, ...]
    data: Tensor
    scales: Tensor
    factors: Tensor | None

    def __post_init__(self) -> None:
        assert self.data.shape == self.sizes(self.shape, self.bits, self.group)[0]
        assert self.scales.shape == self.sizes(self.shape, self.bits, self.group)[1]
        assert self.data.dtype == torch.uint8
        assert self.scales.dtype == (torch.float32 if self.factors is None else torch.float8_e4m3fn)

    @staticmethod
    def sizes(shape: tuple[int, ...], bits: int, group: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `data` and `scales` for a matrix of some shape."""
        *count, outputs, inputs = shape
        tiles, chunks = -(-outputs // LANES), -(-inputs // CHUNK)
        head = (count[0] if count else 1, tiles)
        return (*head, chunks * CHUNK * LANES * bits // 8), (*head, inputs // group if group else 1, LANES)

    def dequantize(self) -> Tensor:
        """Value times scale: float32, as `shape` says."""
        return unpack(self).dequantize()

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.data.nbytes + self.scales.nbytes + (0 if self.factors is None else self.factors.nbytes)

    @property
    def c(self) -> native.Matrix:
        """What the library is given; it holds addresses, so keep this object as long as it is used."""
        *count, outputs, inputs = self.shape
        own = (native.address(tensor) for tensor in (self.data, self.scales, self.factors))
        return native.Matrix(self.bits, count[0] if count else 1, outputs, inputs, self.group or 0, *own)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table [O, I] as numbers: ids [...] int64 -> float32 [..., I]."""
        assert len(self.shape) == 2
        flat, tiles = ids.flatten(), self.data.shape[1]
        if self.bits == 8:
            quads = self.data.view(tiles, -1, LANES, 4)[flat // LANES, :, flat % LANES]
        else:
            both = self.data.view(tiles, -1, 4, LANES, 4)[flat // LANES, :, :, flat % LANES]
            quads = torch.cat([both & 15, both >> 4], dim=2)
        scales = self.scales[0, flat // LANES, :, flat % LANES]
        factors = None if self.factors is None else self.factors.view(-1, 1)[flat]
        return self.of(quads.flatten(1)[:, : self.shape[1]], scales, factors).dequantize().view(*ids.shape, -1)

    def of(self, values: Tensor, scales: Tensor, factors: Tensor | None) -> Quantized:
        """Rows of it, from stored values of a byte each."""
        pairs = self.bits == 4
        data = values[..., ::2] | (values[..., 1::2] << 4) if pairs else (values ^ 0x80).view(torch.int8)
        return Quantized(bits=self.bits, group=self.group, data=data, scales=scales, factors=factors)


def can_pack(weight: Quantized) -> bool:
    """Whether the compiled kernels have a layout for it: NVFP4; whole numbers in groups of whole chunks."""
    whole = weight.group is None or weight.group % CHUNK == 0
    return (weight.form == "nvfp4" or (whole and not weight.floating)) and weight.shape[-1] <= MOST_INPUTS


def pack(weight: Quantized) -> Packed | Quantized:
    """A weight in the layout of the compiled kernels, for `cpu.linear` and the others: done once, at load.

    What they have no layout for comes back as it is, and so does everything where they are missing; the operations
    take both.
    """
    library = native.library()
    if library is None or not can_pack(weight):
        return weight
    data, scales = Packed.sizes(weight.shape, weight.bits, weight.group)
    factors = weight.factors
    if factors is not None:
        factors = F.pad(factors[..., 0], (0, -weight.shape[-2] % LANES)).view(*data[:2], LANES).contiguous()
    packed = Packed(
        bits=weight.bits,
        group=weight.group,
        shape=weight.shape,
        data=torch.empty(data, dtype=torch.uint8),
        scales=torch.empty(scales, dtype=weight.scales.dtype),
        factors=factors,
    )
    values, own = weight.data.contiguous(), weight.scales.contiguous()
    library.dgemma_pack(
        ctypes.byref(packed.c),
        native.address(values),
        native.address(own),
        native.address(packed.data),
        native.address(packed.scales),
        native.threads(),
    )
    return packed


def unpack(packed: Packed) -> Quantized:
    """The weight that `pack` was given."""
    *count, outputs, inputs = packed.shape
    matrices, tiles, _ = packed.data.shape
    if packed.bits == 4:
        both = packed.data.view(matrices, tiles, -1, 4, LANES, 4)
        quads = torch.cat([both & 15, both >> 4], dim=3).flatten(2, 3)
    else:
        quads = packed.data.view(matrices, tiles, -1, LANES, 4)
    values = quads.transpose(2, 3).reshape(matrices, tiles * LANES, -1)[:, :outputs, :inputs]
    scales = packed.scales.transpose(2, 3).reshape(matrices, tiles * LANES, -1)[:, :outputs]
    factors = None if packed.factors is None else packed.factors.view(matrices, tiles * LANES, 1)[:, :outputs]
    return packed.of(values, scales, factors).each(lambda own: own.reshape(*count, outputs, -1).contiguous())
