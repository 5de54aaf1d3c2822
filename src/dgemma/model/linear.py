"""Matrix products in which a row's result does not depend on how many other rows there are.

A weight is a tensor, or one in few bits: `quant.Quantized`, or `kernels.cpu.Packed` where the CPU kernels are there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import cpu

Weight = Tensor | cpu.Weight
TILE = 1 << 21  # weights in few bits that are made floating-point at a time


def least_rows() -> int:
    """Rows that a float32 product on a CPU needs for each of them to be summed in the usual order.

    Libraries have other routines for products of few rows, whose sums differ in the last bits, and divide the rows
    among threads before they choose.
    """
    return max(16, 8 * torch.get_num_threads())


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] -> [..., O].

    On a CPU in float32 few rows are filled up to `least_rows`, so that a token's values are bit for bit the same
    alone, in a batch, and in any chunk of its prompt. Weights in few bits meet activations in 8 bits there.
    """
    if not isinstance(weight, Tensor):
        if x.device.type == "cpu":
            return cpu.linear(x, weight)
        return torch.cat([F.linear(x, tile.to(x.dtype)) for tile in _tiles(weight)], dim=-1)
    rows = x.shape[:-1].numel()
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows >= least_rows():
        return F.linear(x, weight)
    flat = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, least_rows() - rows))
    return F.linear(flat, weight)[:rows].view(*x.shape[:-1], weight.shape[0])


def combine(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight`: [..., O] and [O, I] -> [..., I], the rows' weighted sum."""
    if isinstance(weight, Tensor):
        return linear(x, weight.mT)
    total, first = torch.zeros(*x.shape[:-1], weight.shape[-1], device=x.device), 0
    for tile in _tiles(weight):
        total += linear(x[..., first : first + len(tile)].float(), tile.mT)
        first += len(tile)
    return total.to(x.dtype)


def lookup(tokens: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of a table: [...] int64 and [V, H] -> [..., H]."""
    if isinstance(weight, Tensor):
        return F.embedding(tokens, weight)
    rows = weight.rows(tokens) if isinstance(weight, cpu.Packed) else weight[tokens].dequantize()
    return rows.to(dtype)


def _tiles(weight: cpu.Weight) -> Iterator[Tensor]:
    """A matrix's rows as float32, some at a time: all of them would take eight times its memory."""
    plain = cpu.unpack(weight) if isinstance(weight, cpu.Packed) else weight
    step = max(1, TILE // plain.shape[-1])
    for first in range(0, plain.shape[0], step):
        yield plain[first : first + step].dequantize()


class Linear(nn.Linear):
    """A layer without bias on `linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight)
