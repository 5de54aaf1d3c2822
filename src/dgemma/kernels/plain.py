"""What the GPU's kernels compute, in plain torch. Tests and `gpu-check` compare the two, and this is what runs where
there are none.

Weights of whole numbers meet activations as they are (the CPU's kernels round those to 8 bits; their twins are in
`reference`). Weights in FP8 meet activations in FP8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import Quantized

Weight = Tensor | Quantized
SPAN = 64  # of what is between an expert's products in FP8: inputs that share a scale


def fp8_rows(x: Tensor, span: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows [T, I] -> float8_e4m3fn [T, I], and scales: [T, 1], or with a span one for each `span` inputs.

    The largest of those that share a scale becomes 448.
    """
    width = x.shape[-1]
    span = span or width
    parts = F.pad(x.float(), (0, -width % span)).unflatten(-1, (-1, span))
    largest = parts.abs().amax(dim=-1)
    scales = torch.where(largest == 0.0, 1.0, largest / 448.0)
    return (parts / scales[..., None]).flatten(-2)[..., :width].to(torch.float8_e4m3fn), scales


def linear(x: Tensor, weight: Weight, span: int | None = None) -> Tensor:
    """`x @ weight.T`: [T, I] and [O, I] -> [T, O] in x's dtype."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    own = weight.dequantize()
    if not weight.floating:
        return F.linear(x.float(), own).to(x.dtype)
    values, scales = fp8_rows(x, span)
    wide = scales.repeat_interleave(span or x.shape[-1], dim=-1)[:, : x.shape[-1]]
    return F.linear(values.float() * wide, own).to(x.dtype)


def experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Sum over each token's k experts of weight times `down(gelu(gate(x)) * up(x))`, in the router's order.

    x [T, H], weights and experts [T, k], gate_up [E, 2I, H], down [E, H, I] -> [T, H] in x's dtype.
    """
    return mixture(x, weights, experts, lambda index, own: mlp(own, gate_up[index], down[index]))


def mixture(x: Tensor, weights: Tensor, experts: Tensor, output: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sum over each token's k experts of weight times `output(expert, rows)`, in float32, in the router's order."""
    outputs = torch.zeros(*experts.shape, x.shape[-1], device=x.device)
    for index in experts.unique().tolist():
        token, choice = (experts == index).nonzero(as_tuple=True)
        outputs[token, choice] = output(index, x[token]).float()
    total = torch.zeros(x.shape, device=x.device)
    for choice in range(experts.shape[1]):
        total = total + outputs[:, choice] * weights[:, choice, None]
    return total.to(x.dtype)


def mlp(x: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """A gated feed-forward with fused weights [2I, H] and [H, I]: [T, H] -> [T, H] in x's dtype."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(F.gelu(gate, approximate="tanh") * up, down, SPAN)


def group(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Assignments [T, k] -> their numbers sorted by expert [T * k], and where each expert's begin [E + 1]; int32."""
    flat = experts.flatten()
    counts = torch.zeros(count, dtype=torch.int32, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return torch.argsort(flat, stable=True).to(torch.int32), offsets
