"""Random tensors and weights for the tests of GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.quant import Quantized
from dgemma.quant.quantized import pack_nibbles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal ones."""
    generator = torch.Generator().manual_seed(seed * 7919 + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def weight(form: str, *shape: int, seed: int = 0) -> Tensor | Quantized:
    """A weight of about 1 / sqrt(inputs): "float32", "bfloat16", "fp8", "int8", "nvfp4" or "int4-64" with its group."""
    name, _, group = form.partition("-")
    plain = numbers(*shape, scale=shape[-1] ** -0.5, seed=seed + 1)
    if name in ("float32", "bfloat16"):
        return plain.to(getattr(torch, name))
    if name == "nvfp4":
        return e2m1(plain)
    span, most = int(group or shape[-1]), {"fp8": 448.0, "int8": 127.0, "int4": 7.0}[name]
    parts = plain.unflatten(-1, (-1, span))
    scales = parts.abs().amax(dim=-1) / most
    values = (parts / scales[..., None]).flatten(-2)
    if name == "fp8":
        data = values.to(torch.float8_e4m3fn)
    else:
        data = values.round().to(torch.int8)
        data = pack_nibbles(data) if name == "int4" else data
    return Quantized(bits=4 if name == "int4" else 8, group=int(group) if group else None, data=data, scales=scales)


def e2m1(weight: Tensor) -> Quantized:
    """Rounded down to E2M1, with scales of E4M3 that make the largest of 16 about 6, and a factor of its own a row."""
    parts = weight.unflatten(-1, (-1, 16))
    factors = parts.abs().amax(dim=(-1, -2))[..., None] / 448.0 / 12.0
    scales = (parts.abs().amax(dim=-1) / 12.0 / factors).to(torch.float8_e4m3fn)
    twice = parts / (scales.float() * factors)[..., None].clamp_min(1e-30)
    sizes = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0], device=weight.device)
    codes = torch.bucketize(twice.abs().contiguous(), sizes, right=True) | (twice < 0).int() << 3
    pairs = codes.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2))
    return Quantized(bits=4, group=16, data=pairs[..., 0] | pairs[..., 1] << 4, scales=scales, factors=factors)


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """No number further away than a share of the largest."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    gap = (found.float() - wanted.float()).abs().max() if found.numel() else torch.tensor(0.0)
    assert gap <= tolerance * max(1e-6, float(wanted.float().abs().max())), f"{float(gap)}"
