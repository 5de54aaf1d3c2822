"""Where the two references disagree: what is committed, what stability means, when a canvas is confident."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Stateless rules, passed to the loop.

    Fields:
        commit: (argmax [B, L], canvas after the step [B, L]) -> tokens that are committed.
        remember: (argmax, canvas after the step) -> what the next steps' argmax is compared with.
        remembers_start: whether the initial noise counts as remembered.
        confident: (mean entropy [B], threshold) -> [B] bool.
    """

    name: str
    commit: Callable[[Tensor, Tensor], Tensor]
    remember: Callable[[Tensor, Tensor], Tensor]
    remembers_start: bool
    confident: Callable[[Tensor, float], Tensor]


def _argmax(argmax: Tensor, canvas: Tensor) -> Tensor:
    return argmax


def _canvas(argmax: Tensor, canvas: Tensor) -> Tensor:
    return canvas


TRANSFORMERS = Policy(name="transformers", commit=_argmax, remember=_argmax, remembers_start=False, confident=torch.lt)
JAX = Policy(name="jax", commit=_canvas, remember=_canvas, remembers_start=True, confident=torch.le)


class Stability:
    """The last `threshold` remembered canvases of each row; stable when the argmax equals them all."""

    def __init__(self, policy: Policy, threshold: int, start: Tensor):
        self.policy = policy
        self.remembered = [torch.full_like(start, -1)] * threshold  # no token is -1: nothing equals it
        if policy.remembers_start and threshold:
            self.remembered[-1] = start

    def update(self, argmax: Tensor, canvas: Tensor, part: Tensor | None = None) -> Tensor:
        """Takes in one step -> [B] bool. With a threshold of 0 every row is stable.

        Args:
            part: the positions that matter [B, L] bool; None for all.
        """
        stable = torch.ones(len(argmax), dtype=torch.bool, device=argmax.device)
        for earlier in self.remembered:
            same = earlier == argmax
            stable &= (same if part is None else same | ~part).all(dim=-1)
        if self.remembered:
            self.remembered = [*self.remembered[1:], self.policy.remember(argmax, canvas)]
        return stable
