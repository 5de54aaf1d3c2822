"""A weight in few bits, as it is held in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """One matrix [O, I], or E of them [E, O, I]: value times scale.

    Fields:
        bits: 4 or 8.
        group: neighbouring inputs that share a scale; None: one scale a row.
        data: 4 bits: uint8 [..., O, I/2], two values a byte, the even input in the low nibble, each stored as
            value + 8 (-8..7). 8 bits: [..., O, I], int8, or float8_e4m3fn where the values are floating-point.
        scales: float32 [..., O, I/group], or [..., O, 1].
    """

    bits: int
    group: int | None
    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        width, count = self.shape[-1], self.scales.shape[-1]
        assert self.bits in (4, 8) and self.scales.dtype == torch.float32
        assert self.data.dtype in ((torch.uint8,) if self.bits == 4 else (torch.int8, torch.float8_e4m3fn))
        assert count * (self.group or width) == width, f"{count} scales for {width} inputs in groups of {self.group}"
        assert self.data.shape[:-1] == self.scales.shape[:-1]

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], *, bits: int, group: int | None, dtype: torch.dtype, device: torch.device
    ) -> Quantized:
        """Memory of a given shape, not yet filled; `dtype` is that of `data`."""
        *rows, width = shape
        return cls(
            bits=bits,
            group=group,
            data=torch.empty(*rows, width * bits // 8, dtype=dtype, device=device),
            scales=torch.empty(*rows, width // group if group else 1, dtype=torch.float32, device=device),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., O, I)."""
        *rows, width = self.data.shape
        return (*rows, width * 8 // self.bits)

    @property
    def floating(self) -> bool:
        """Whether the values are FP8 and not whole numbers."""
        return self.data.dtype == torch.float8_e4m3fn

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.data.nbytes + self.scales.nbytes

    def __getitem__(self, index: Any) -> Quantized:
        """Experts or rows: an index, as torch takes it, into all axes but the last. A view where torch makes one."""
        return Quantized(bits=self.bits, group=self.group, data=self.data[index], scales=self.scales[index])

    def to(self, device: torch.device | str) -> Quantized:
        """The same on another device."""
        return Quantized(bits=self.bits, group=self.group, data=self.data.to(device), scales=self.scales.to(device))

    def values(self) -> Tensor:
        """The values without their scales: [..., O, I], int8 (float32 where they are floating-point)."""
        if self.floating:
            return self.data.float()
        if self.bits == 8:
            return self.data
        pairs = torch.stack([self.data & 0xF, self.data >> 4], dim=-1)
        return pairs.flatten(-2).to(torch.int8) - 8

    def dequantize(self) -> Tensor:
        """Value times scale: float32 [..., O, I]."""
        values = self.values().float()
        if self.group is None:
            return values * self.scales
        return (values.unflatten(-1, (-1, self.group)) * self.scales[..., None]).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """Values -8..7 [..., I] -> uint8 [..., I/2], the even one in the low nibble, each as value + 8."""
    pairs = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)
