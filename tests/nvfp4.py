"""Random weights in NVFP4."""

from __future__ import annotations

import torch

from dgemma.quant import Quantized


def nvfp4(*shape: int, seed: int = 0) -> Quantized:
    """[..., O, I] of about 1 / sqrt(inputs): any codes, scales below and above zero, one of a row's subnormal, and a
    factor of its own for each row."""
    *rows, width = shape
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    data = torch.randint(0, 256, (*rows, width // 2), dtype=torch.uint8, generator=generator)
    scales = (torch.randn(*rows, width // 16, generator=generator) * 8).to(torch.float8_e4m3fn)
    scales[..., 0] = 2.0**-9
    factors = (torch.rand(*rows, 1, generator=generator) + 0.5) * 0.02 * width**-0.5
    return Quantized(bits=4, group=16, data=data, scales=scales, factors=factors)
