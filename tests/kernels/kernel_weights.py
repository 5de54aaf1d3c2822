"""Random weights for the tests of the CPU kernels."""

from __future__ import annotations

import torch

from dgemma.quant import Quantized
from dgemma.quant.layouts import NVFP4_GROUP
from nvfp4 import nvfp4


def random_weight(shape: tuple[int, ...], bits: int, group: int | None, generator: torch.Generator) -> Quantized:
    """Any values, the extremes among them; 4 bits in groups of 16 are NVFP4, with scales below and above zero."""
    *head, width = shape
    kind = torch.uint8 if bits == 4 else torch.int8
    low, high = (0, 256) if bits == 4 else (-128, 128)
    data = torch.randint(low, high, (*head, width * bits // 8), generator=generator).to(kind)
    data[..., 0, :] = low  # a row of -8 or -128
    if (bits, group) == (4, NVFP4_GROUP):
        return nvfp4(*shape, seed=int(torch.randint(0, 1 << 20, (), generator=generator)))
    scales = torch.rand(*head, width // group if group else 1, generator=generator) * 0.02
    return Quantized(bits=bits, group=group, data=data, scales=scales)
