"""A mixture of experts on the GPU against its twin: formats, experts without tokens, skewed routing."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers, room, weight

from dgemma.kernels import plain
from dgemma.kernels.triton.experts import blocks, expert_outputs, weighted_sum
from dgemma.kernels.triton.tiles import Tile


@pytest.mark.parametrize("routing", ["even", "one", "skewed"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8", "int8", "int4-32", "nvfp4"])
def test_experts(form: str, routing: str) -> None:
    """Against the sum of feed-forwards: experts without tokens, one with all, more tokens than a tile."""
    tokens, k, count, hidden, width = 21, 3, 5, 64, 192 if form == "nvfp4" else 96
    x = numbers(tokens, hidden, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
    gate_up, down = weight(form, count, 2 * width, hidden), weight(form, count, hidden, width, seed=1)
    experts, weights = choices(routing, tokens, k, count), numbers(tokens, k).softmax(dim=-1)
    order, offsets = plain.group(experts, count)
    small = Tile(rows=16, columns=64, inner=64)
    for tiles in (None, (small, small)) if routing == "skewed" else (None,):
        parts = expert_outputs(x, order, offsets, gate_up, down, tiles=tiles)
        tolerance = {"bfloat16": 2**-6, "fp8": room(form, 2e-3, 2**-5)}.get(form, 2e-6)
        near(weighted_sum(parts, weights), plain.experts(x, weights, experts, gate_up, down), tolerance)


def choices(routing: str, tokens: int, k: int, count: int) -> torch.Tensor:
    """Distinct experts for each token."""
    scores = numbers(tokens, count, seed=3)
    if routing == "one":
        scores[:, 2] += 100.0
    if routing == "skewed":
        scores += torch.arange(count, device=DEVICE) * 1.5
    return scores.topk(k, dim=-1).indices


def test_experts_without_tokens() -> None:
    """Nothing in, nothing out."""
    x = numbers(0, 32)
    order, offsets = plain.group(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), 4)
    parts = expert_outputs(x, order, offsets, weight("float32", 4, 32, 32), weight("float32", 4, 32, 16))
    assert parts.shape[0] == 0


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_blocks_are_enough_whatever_the_routing(rows: int) -> None:
    """The bound holds for one expert with all, for all alike, and for the worst: a row too many everywhere."""
    for count, tokens, k in [(4, 10, 2), (128, 256, 8), (8, 3, 1)]:
        bound = blocks(tokens, k, count, rows)
        even = torch.full((count,), tokens * k // count)
        even[: tokens * k % count] += 1
        one_more = torch.zeros(count, dtype=torch.int64)
        left = tokens * k
        for index in range(count):
            one_more[index] = min(left, rows + 1 if left > rows else left)
            left -= int(one_more[index])
        one_more[0] += left
        for counts in (even, one_more):
            assert int(counts.sum()) == tokens * k
            assert int(-(-counts // rows).sum()) <= bound
