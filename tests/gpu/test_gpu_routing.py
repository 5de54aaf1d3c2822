"""Routing in one launch against the network's own router and a stable sort."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers

from dgemma.kernels import plain
from dgemma.kernels.triton.routing import route


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize(("tokens", "count", "k"), [(1, 1, 1), (5, 3, 3), (33, 8, 2), (70, 20, 4), (40, 128, 8)])
def test_route(tokens: int, count: int, k: int, skew: float) -> None:
    """Weights, experts, order and offsets, one after another so that the counter is seen to start again."""
    scale = numbers(count, seed=1).abs() + 0.5
    for seed in (2, 3):
        scores = numbers(tokens, count, seed=seed) * 2 + skew * torch.arange(count, device=DEVICE)
        found = route(scores, k, scale)
        weights, experts = torch.topk(torch.softmax(scores, dim=-1), k, dim=-1)
        assert torch.equal(found.experts, experts)
        near(found.weights, weights / weights.sum(dim=-1, keepdim=True) * scale[experts], 2e-6)
        order, offsets = plain.group(experts, count)
        assert torch.equal(found.order, order) and torch.equal(found.offsets, offsets)


def test_ties_go_to_the_first_expert() -> None:
    """Also where nothing else decides, and where scores are of few bits."""
    found = route(torch.zeros(3, 6, device=DEVICE), 4, torch.ones(6, device=DEVICE))
    assert found.experts.tolist() == [[0, 1, 2, 3]] * 3
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]], device=DEVICE).bfloat16()
    assert route(scores, 3, torch.ones(5, device=DEVICE)).experts.tolist() == [[1, 3, 2]]


def test_no_tokens() -> None:
    """All experts are empty."""
    found = route(torch.zeros(0, 6, device=DEVICE), 2, torch.ones(6, device=DEVICE))
    assert found.offsets.tolist() == [0] * 7 and found.order.numel() == 0
