"""The sampler's formulas as pure functions of tensors. B batch, L canvas, V vocabulary; entropies are in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def temperature(step: int, steps: int, t_min: float, t_max: float) -> Tensor:
    """Linear schedule for step = steps, ..., 1 (counting down): `t_min + (t_max - t_min) * step / steps`.

    Float32 throughout, so that the quotients are bit for bit those of the reference.
    """
    return t_min + (t_max - t_min) * (torch.tensor(step, dtype=torch.int32) / steps)


def entropy(processed: Tensor) -> Tensor:
    """Entropy of softmax(processed): [..., V] -> [...]. A word of probability zero adds nothing."""
    logs = processed - processed.logsumexp(dim=-1, keepdim=True)
    return -(logs.clamp_min(torch.finfo(logs.dtype).min) * torch.softmax(logs, dim=-1)).sum(dim=-1)


def accept(entropies: Tensor, bound: float | Tensor) -> Tensor:
    """Positions that keep their sample: [B, L] -> [B, L] bool.

    In order of rising entropy, the most positions for which the sum of entropies without the largest stays within
    the bound (Ben-Hamu et al. 2025, arXiv:2505.24857): the sum bounds what the positions tell about each other.
    At least one position is accepted; of equal entropies the first come first. `bound`: one for all, or [B, 1].
    """
    rising, order = torch.sort(entropies, dim=-1, stable=True)
    within = torch.cumsum(rising, dim=-1) - rising <= bound
    return torch.zeros_like(within).scatter(-1, order, within)


def keep_likely(processed: Tensor, top_k: int | None, top_p: float, min_p: float = 0.0) -> Tensor:
    """Sets to -inf the scores outside the k likeliest, outside the smallest set of probability top_p, and of words
    whose probability is below min_p times the likeliest's.
    """
    if top_k is not None and top_k < processed.shape[-1]:
        least = processed.topk(top_k, dim=-1).values[..., -1:]
        processed = processed.masked_fill(processed < least, float("-inf"))
    if top_p < 1.0:
        falling, order = torch.sort(processed, dim=-1, descending=True)
        mass = torch.softmax(falling, dim=-1).cumsum(dim=-1)
        outside = mass - torch.softmax(falling, dim=-1) >= top_p
        processed = processed.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    if min_p > 0.0:
        least = processed.amax(dim=-1, keepdim=True) + math.log(min_p)
        processed = processed.masked_fill(processed < least, float("-inf"))
    return processed


def through_end(tokens: Tensor, ends: Tensor) -> Tensor:
    """Positions up to the first end token, that one included; all where there is none: [B, L] -> [B, L] bool.

    `ends`: [E], or each row's own [B, E], filled up with -1.
    """
    return ~after_end(tokens, ends)


def after_end(tokens: Tensor, ends: Tensor) -> Tensor:
    """Positions behind the first end token: [B, L] -> [B, L] bool."""
    is_end = torch.isin(tokens, ends) if ends.dim() == 1 else (tokens[..., None] == ends[:, None]).any(dim=-1)
    return is_end.cumsum(dim=-1) - is_end.long() > 0
