"""Text before its canvas is done: which first tokens of a canvas can be given out now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A token is sure when it has been the likeliest for `steps` steps and its entropy is below `entropy` nats."""

    steps: int
    entropy: float


RULES = {"safe": Rule(steps=3, entropy=0.005), "eager": Rule(steps=2, entropy=0.05)}


class Prefix:
    """Watches a canvas for its sure beginning."""

    def __init__(self, rule: Rule, length: int):
        self.rule = rule
        self._before = torch.full((length,), -1)
        self._held = torch.zeros(length, dtype=torch.int64)

    def update(self, likeliest: Tensor, entropies: Tensor) -> int:
        """Takes in one step, [L] each; returns how many of the first tokens are sure."""
        likeliest, entropies = likeliest.cpu(), entropies.cpu()
        self._held = torch.where(likeliest == self._before, self._held + 1, 1)
        self._before = likeliest
        sure = (self._held >= self.rule.steps) & (entropies < self.rule.entropy)
        return int(sure.long().cumprod(dim=0).sum())
