"""What the CPU kernels compute, in plain torch: the same arithmetic in the same order, bit for bit where a docstring
says so. Tests compare the two, and this is what runs where the library was not built.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import Quantized
from . import belief, plain
from .belief import Belief
from .wish import Wish

_EXACT = 1 << 24  # whole numbers below it are exact in float32


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, I] -> whole numbers -127..127 as float32 [T, I], and scales [T, 1]: the largest of a row becomes 127.

    A row with NaN or infinity has the scale NaN, one that is nearly zero is zero. Rounds half to even.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    finite, small = torch.isfinite(x).all(dim=-1, keepdim=True), largest < 1e-30
    # Not `127.0 / largest`: with a number on the left torch multiplies by a reciprocal, which rounds twice.
    values = torch.where(finite & ~small, torch.round(x * (torch.full_like(largest, 127.0) / largest)), 0.0)
    scales = torch.where(small, 0.0, largest / 127.0)
    return values, torch.where(finite, scales, torch.nan)


def linear(x: Tensor, weight: Quantized) -> Tensor:
    """Products with activations that are rounded row by row: [T, I] and [O, I] -> [T, O] in x's dtype.

    Whole numbers are summed exactly within a group; then, in float32, times the group's scale, added up in the order
    of the groups, times the output's factor where there are factors, times the row's scale. Floating-point weights are
    products of their own.
    """
    if weight.floating:
        return F.linear(x.float(), weight.dequantize()).to(x.dtype)
    values, scales = quantize_rows(x)
    width = weight.shape[-1]
    span = weight.group or width
    # A group of 64 or so is exact in float32; a whole row of 8-bit values may not be.
    exact = torch.float32 if span << (weight.bits - 1) << 7 < _EXACT else torch.float64
    own = weight.values().to(exact)
    values = values.to(exact)
    out = torch.zeros(x.shape[0], weight.shape[-2])
    for group, first in enumerate(range(0, width, span)):
        part = slice(first, first + span)
        out = out + (values[:, part] @ own[:, part].T).float() * weight.scales[:, group].float()
    out = out if weight.factors is None else out * weight.factors[:, 0]
    return (out * scales).to(x.dtype)


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm in float32 whatever the input's dtype: [..., I] -> [..., I] in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).to(x.dtype)


def exponential(x: Tensor) -> Tensor:
    """e^x in float32, as the kernels compute it: the series of e^r up to r^7, |r| <= ln(2) / 2, times 2^n."""
    held = x.clamp(-87.0, 88.0)
    shifted = held * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (held - n * 0.693359375) - n * -2.12194440e-4
    total = torch.full_like(r, 1.98412698e-4)
    for term in (1.38888889e-3, 8.33333333e-3, 4.16666667e-2, 1.66666667e-1, 0.5, 1.0, 1.0):
        total = total * r + term
    return torch.where(x < -87.0, 0.0, torch.ldexp(total, n.nan_to_num()))


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """`gelu(gates) * up` in float32, GELU in its tanh form, bit for bit as the kernels compute it."""
    twice = gates * (1.5957691216 + 0.0713548163 * (gates * gates))
    return gates / (1.0 + exponential(-twice)) * up


def mlp(x: Tensor, gate_up: Quantized, down: Quantized) -> Tensor:
    """A gated feed-forward with fused weights [2I, H] and [H, I]: [T, H] -> [T, H] in x's dtype."""
    both = linear(x.float(), gate_up)
    return linear(gate(*both.chunk(2, dim=-1)), down).to(x.dtype)


def experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Quantized, down: Quantized) -> Tensor:
    """Sum over each token's k experts of weight times `mlp`, in the router's order, in float32.

    x [T, H], weights and experts [T, k], gate_up [E, 2I, H], down [E, H, I] -> [T, H] in x's dtype.
    """
    return plain.mixture(x, weights, experts, lambda index, own: mlp(own.float(), gate_up[index], down[index]))


def read(scores: Tensor, wish: Wish, uniform: Tensor | None) -> tuple[Belief, Tensor, Tensor]:
    """Scores [n, V] float32 -> what is found, the weights exp(score - largest) [n, V] and their sums [n, 1]."""
    sound = torch.isfinite(scores).all(dim=-1)
    found, weights, total = belief.read(wish.process(scores), uniform)
    return found._replace(entropies=torch.where(sound, found.entropies, torch.nan)), weights, total
