"""Matrix products in which a row's result does not depend on how many other rows there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def least_rows() -> int:
    """Rows that a float32 product on a CPU needs for each of them to be summed in the usual order.

    Libraries have other routines for products of few rows, whose sums differ in the last bits, and divide the rows
    among threads before they choose.
    """
    return max(16, 8 * torch.get_num_threads())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] -> [..., O].

    On a CPU in float32 few rows are filled up to `least_rows`, so that a token's values are bit for bit the same
    alone, in a batch, and in any chunk of its prompt.
    """
    rows = x.shape[:-1].numel()
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows >= least_rows():
        return F.linear(x, weight)
    flat = F.pad(x.reshape(rows, x.shape[-1]), (0, 0, 0, least_rows() - rows))
    return F.linear(flat, weight)[:rows].view(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """A layer without bias on `linear`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return linear(x, self.weight)
