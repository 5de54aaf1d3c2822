"""Weights laid out for the compiled kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import Quantized
from ..quant.layouts import NVFP4_GROUP
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
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        assert found == self.parts(self.shape, self.bits, self.group)

    @staticmethod
    def parts(shape: tuple[int, ...], bits: int, group: int | None) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Types and shapes of the tensors that a matrix of some shape is made of, by field."""
        *count, outputs, inputs = shape
        tiles, chunks = -(-outputs // LANES), -(-inputs // CHUNK)
        head, two_scales = (count[0] if count else 1, tiles), is_nvfp4(bits, group)
        parts = {
            "data": (torch.uint8, (*head, chunks * CHUNK * LANES * bits // 8)),
            "scales": (
                torch.float8_e4m3fn if two_scales else torch.float32,
                (*head, inputs // group if group else 1, LANES),
            ),
        }
        return parts | ({"factors": (torch.float32, (*head, LANES))} if two_scales else {})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def dequantize(self) -> Tensor:
        """Value times scale: float32, as `shape` says."""
        return unpack(self).dequantize()

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

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


def is_nvfp4(bits: int, group: int | None) -> bool:
    """Whether a packed weight is NVFP4: those of whole numbers have groups of whole chunks."""
    return bits == 4 and group == NVFP4_GROUP


def can_pack(weight: Quantized) -> bool:
    """Whether the compiled kernels have a layout for it: NVFP4; whole numbers in groups of whole chunks."""
    whole = not weight.floating and (weight.group is None or weight.group % CHUNK == 0)
    return (whole or weight.form == "nvfp4") and weight.shape[-1] <= MOST_INPUTS


def pack(weight: Quantized) -> Packed | Quantized:
    """A weight in the layout of the compiled kernels, for `cpu.linear` and the others: done once, at load.

    What they have no layout for comes back as it is, and so does everything where they are missing; the operations
    take both.
    """
    library = native.library()
    if library is None or not can_pack(weight):
        return weight
    parts = Packed.parts(weight.shape, weight.bits, weight.group)
    factors = weight.factors
    if factors is not None:
        factors = F.pad(factors[..., 0], (0, -weight.shape[-2] % LANES)).view(parts["factors"][1]).contiguous()
    packed = Packed(
        bits=weight.bits,
        group=weight.group,
        shape=weight.shape,
        data=torch.empty(parts["data"][1], dtype=parts["data"][0]),
        scales=torch.empty(parts["scales"][1], dtype=parts["scales"][0]),
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
