"""A weight in few bits, as it is held in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .layouts import NVFP4_GROUP

# Twice the number that an E2M1 code stands for: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and below zero.
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """One matrix [O, I], or E of them [E, O, I]: value times scale.

    In form "nvfp4" there are two scales. Their product in float32 is a group's scale; both are kept as they are stored,
    because the first alone times a value has few enough bits for kernels to be exact.

    Fields:
        bits: 4 or 8.
        group: neighbouring inputs that share a scale; None: one scale a row.
        data: 4 bits: uint8 [..., O, I/2], two values a byte, the even input in the low nibble, each stored as
            value + 8 (-8..7), or in "nvfp4" as an E2M1 code, whose value here is twice the number that it stands for.
            8 bits: [..., O, I], int8, or float8_e4m3fn where the values are floating-point.
        scales: float32 [..., O, I/group], or [..., O, 1]; in "nvfp4" float8_e4m3fn.
        factors: "nvfp4": float32 [..., O, 1], by which a row's scales are multiplied; otherwise None.
    """

    bits: int
    group: int | None
    data: Tensor
    scales: Tensor
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        width, count = self.shape[-1], self.scales.shape[-1]
        assert self.bits in (4, 8)
        assert self.data.dtype in ((torch.uint8,) if self.bits == 4 else (torch.int8, torch.float8_e4m3fn))
        assert count * (self.group or width) == width, f"{count} scales for {width} inputs in groups of {self.group}"
        assert self.data.shape[:-1] == self.scales.shape[:-1]
        if self.factors is None:
            assert self.scales.dtype == torch.float32
        else:
            assert self.bits == 4 and self.group == NVFP4_GROUP and self.scales.dtype == torch.float8_e4m3fn
            assert self.factors.dtype == torch.float32 and self.factors.shape == (*self.shape[:-1], 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., O, I)."""
        *rows, width = self.data.shape
        return (*rows, width * 8 // self.bits)

    @property
    def form(self) -> str:
        """ "int4", "int8", "fp8" or "nvfp4"."""
        if self.floating:
            return "fp8"
        return f"int{self.bits}" if self.factors is None else "nvfp4"

    @property
    def floating(self) -> bool:
        """Whether the values are FP8 and not whole numbers."""
        return self.data.dtype == torch.float8_e4m3fn

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by field: each [..., O, numbers of a row]."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def each(self, change: Callable[[Tensor], Tensor]) -> Quantized:
        """The same form, made of what becomes of each tensor."""
        return replace(self, **{name: change(tensor) for name, tensor in self.tensors.items()})  # type: ignore[arg-type]

    def room(self, lead: tuple[int, ...], device: torch.device) -> Quantized:
        """Memory for matrices of this form and width, not yet filled: (..., O) to [..., O, I]."""
        return self.each(lambda own: torch.empty(*lead, own.shape[-1], dtype=own.dtype, device=device))

    def __getitem__(self, index: Any) -> Quantized:
        """Experts or rows: an index, as torch takes it, into all axes but the last. A view where torch makes one."""
        return self.each(lambda own: own[index])

    def to(self, device: torch.device | str) -> Quantized:
        """The same on another device."""
        return self.each(lambda own: own.to(device))

    def values(self) -> Tensor:
        """The values without their scales: [..., O, I], int8 (float32 where they are floating-point)."""
        if self.floating:
            return self.data.float()
        if self.bits == 8:
            return self.data
        codes = torch.stack([self.data & 0xF, self.data >> 4], dim=-1).flatten(-2)
        if self.factors is None:
            return codes.to(torch.int8) - 8
        return torch.tensor(_TWICE, dtype=torch.int8, device=self.device)[codes.int()]

    def dequantize(self) -> Tensor:
        """Value times scale: float32 [..., O, I]."""
        values = self.values().float()
        scales = self.scales if self.factors is None else self.scales.float() * self.factors
        if self.group is None:
            return values * scales
        return (values.unflatten(-1, (-1, self.group)) * scales[..., None]).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """Values -8..7 [..., I] -> uint8 [..., I/2], the even one in the low nibble, each as value + 8."""
    pairs = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)
