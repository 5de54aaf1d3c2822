"""Random tensors and weights for the tests of GPU kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from dgemma.quant import Quantized
from dgemma.quant.quantized import pack_nibbles
from nvfp4 import nvfp4

DEVICE = "cuda:0" if torch.cuda.is_available() or os.environ.get("PRETEND_CARD") == "1" else "cpu"

LEAST_ROOM = 0.0 if DEVICE == "cpu" else 2e-5  # a card's exponentials and quotients are good to some last places


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
        return nvfp4(*shape, seed=seed).to(DEVICE)
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


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """No number further away than a share of the largest."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    gap = float((found.float() - wanted.float()).abs().max()) if found.numel() else 0.0
    assert gap <= max(tolerance, LEAST_ROOM) * max(1e-6, float(wanted.float().abs().max())), f"{gap}"


def room(form: str, tolerance: float, card: float = 2**-8) -> float:
    """A tolerance; of FP8 another one on a card, whose sums of such products keep 14 bits."""
    return card if form == "fp8" and DEVICE != "cpu" else tolerance


def alike(found: Tensor, wanted: Tensor) -> None:
    """Equal; on a card but for one number in a hundred, that its quotients have rounded the other way."""
    assert float((found.float() != wanted.float()).float().mean()) <= (0.0 if DEVICE == "cpu" else 0.01)
