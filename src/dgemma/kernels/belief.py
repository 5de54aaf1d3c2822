"""What one look of the network says of each position, from its scores in as few passes as they allow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # words that are summed before the block that holds a sample is searched
_LEAST = -1e4  # stands for -inf: exp of it is zero, and so is zero times it


class Belief(NamedTuple):
    """Of positions [...]: the likeliest word, the sampled one, and the entropy in nats."""

    argmax: Tensor
    sampled: Tensor
    entropies: Tensor


def read(processed: Tensor, uniform: Tensor | None) -> tuple[Belief, Tensor, Tensor]:
    """Processed scores [..., V] -> beliefs, and the distribution as weights [..., V] and their sums [..., 1].

    Equal to argmax, `entropy` and a search in the cumulative distribution but for rounding, from one exponential:
    with w = exp(s - max s) and Z = sum w, the entropy is log Z - sum(w log w) / Z. Overwrites `processed`.

    Args:
        uniform: one number in [0, 1) a position, to sample with [...]; None samples the likeliest.
    """
    argmax = processed.argmax(dim=-1)
    logs = processed.sub_(processed.gather(-1, argmax[..., None])).clamp_(min=_LEAST)
    weights = torch.exp(logs)
    blocks = _block_sums(weights)
    total = blocks.sum(dim=-1, keepdim=True)
    mean = (weights[..., None, :] @ logs[..., :, None])[..., 0] / total
    entropies = (torch.log(total) - mean)[..., 0]
    sampled = argmax if uniform is None else _invert(weights, blocks, uniform)
    return Belief(argmax, sampled, entropies), weights, total


def _block_sums(weights: Tensor) -> Tensor:
    """Sums of neighbouring weights: [..., V] -> [..., ceil(V / BLOCK)]."""
    whole = weights.shape[-1] // BLOCK * BLOCK
    sums = weights[..., :whole].unflatten(-1, (-1, BLOCK)).sum(dim=-1) if whole else weights[..., :0]
    rest = weights[..., whole:]
    return torch.cat([sums, rest.sum(dim=-1, keepdim=True)], dim=-1) if rest.shape[-1] else sums


def _invert(weights: Tensor, blocks: Tensor, uniform: Tensor) -> Tensor:
    """The first word whose cumulative weight is above `uniform` times the total: the block first, then the word."""
    ends = blocks.cumsum(dim=-1)
    target = uniform.to(ends.dtype)[..., None] * ends[..., -1:]
    block = _first_above(ends, target)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_min(0)), 0.0)
    words = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = weights.gather(-1, words.clamp_max(weights.shape[-1] - 1))
    inside = torch.where(words < weights.shape[-1], inside, 0.0)
    return (block * BLOCK + _first_above(inside.cumsum(dim=-1), target - before))[..., 0]


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first of rising `ends` [..., N] above `target` [..., 1]; rounding never carries it past the last
    that rises, since what comes after has no weight.
    """
    below = torch.nextafter(ends[..., -1:], torch.zeros_like(target))
    return torch.searchsorted(ends, torch.minimum(target, below).contiguous(), right=True)
