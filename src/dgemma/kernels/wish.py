"""What a request wants of its scores, as the library takes it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import native
from .belief import Belief


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What happens to raw scores before words are drawn from them, in this order.

    Fields:
        cap: soft-cap, `cap * tanh(score / cap)`; None where the scores have it already.
        bias: words and what is added to their scores.
        heat: what scores are divided by, rounded to float32.
        ends: words that are refused at the first `barred` positions.
    """

    heat: float
    cap: float | None = None
    bias: tuple[tuple[int, float], ...] = ()
    ends: tuple[int, ...] = ()
    barred: int = 0

    def process(self, scores: Tensor) -> Tensor:
        """Raw scores [..., n, V] float32 -> processed ones, in memory of their own."""
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        if self.bias:
            words, values = zip(*self.bias, strict=True)
            scores = scores.clone()
            scores[..., list(words)] += torch.tensor(values, device=scores.device)
        scores = scores / torch.tensor(self.heat, device=scores.device)
        if self.barred and self.ends:
            scores[..., : self.barred, list(self.ends)] = float("-inf")
        return scores

    def after(self, first: int) -> Wish:
        """The same for the positions from `first` on."""
        return replace(self, barred=max(0, self.barred - first))

    def c(self, words: int) -> tuple[native.CWish, list[Tensor]]:
        """What the library is given for a vocabulary, and the tensors that must outlive the call."""
        assert all(0 <= word < words for word in [*self.ends, *(word for word, _ in self.bias)])
        biased = torch.tensor([word for word, _ in self.bias], dtype=torch.int64)
        bias = torch.tensor([value for _, value in self.bias], dtype=torch.float32)
        ends = torch.tensor(self.ends, dtype=torch.int64)
        plain = native.CWish(
            self.cap or 0.0, self.heat, len(biased), biased.data_ptr(), bias.data_ptr(),
            len(ends), ends.data_ptr(), self.barred,
        )  # fmt: skip
        return plain, [biased, bias, ends]


def beliefs_of(count: int, totals: bool) -> tuple[Belief, Tensor | None, native.CBeliefs]:
    """Memory for what is found of n positions, the totals, and both as the library is given them."""
    found = Belief(torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64), torch.empty(count))
    sums = torch.empty(count, 1) if totals else None
    return found, sums, native.CBeliefs(*(ctypes.c_void_p(native.address(t)) for t in (*found, sums)))
