"""Norms, residuals and rotary in one launch each, against the network's own modules."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import near, numbers

from dgemma.config import FULL, AttentionShape
from dgemma.kernels.triton import layer
from dgemma.model.norm import RMSNorm
from dgemma.model.rope import rotate, rotation

EPS = 1e-6


def rms(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The network's norm with a weight."""
    own = RMSNorm(x.shape[-1], EPS, scaled=weight is not None)
    if weight is not None:
        own.weight.data = weight
    return own(x).detach()


@pytest.mark.parametrize(("width", "fraction"), [(8, 1.0), (24, 0.25), (256, 0.25)])
def test_heads(width: int, fraction: float) -> None:
    """Queries and keys normalised and turned, values normalised, new entries in their pages and nothing else."""
    shape = AttentionShape(kind=FULL, heads=3, kv_heads=2, head_dim=width, theta=1e4, rotary_fraction=fraction)
    tokens, page = 5, 4
    queries, keys = numbers(tokens, 3, width), numbers(tokens, 2, width)
    one, two = numbers(width, seed=1), numbers(width, seed=2)
    turn = rotation(torch.arange(7, 7 + tokens), shape, torch.float32)
    slots = torch.tensor([-1, 9, 10, -1, 0])
    pool = torch.zeros(3, 2, page, width), torch.zeros(3, 2, page, width)
    found = layer.heads(
        queries, keys, keys, one, two, (turn[0][:, 0].contiguous(), turn[1][:, 0].contiguous()), EPS,
        slots=slots, pool=pool,
    )  # fmt: skip
    wanted = rotate(rms(queries, one), turn), rotate(rms(keys, two), turn), rms(keys)
    for own, right in zip(found, wanted, strict=True):
        near(own, right, 2e-6)
    for own, right in zip(pool, found[1:], strict=True):
        expected = torch.zeros_like(own)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // page, :, slot % page] = right[token]
        assert torch.equal(own, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 90])
def test_layer(width: int, dtype: torch.dtype) -> None:
    """The two halves of model/block.py around its products."""
    tokens, k = 4, 3
    x, residual, dense = (numbers(tokens, width, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    room, weights = numbers(tokens, k, width, dtype=dtype), numbers(tokens, k).softmax(dim=-1)
    norms, scalars = [numbers(width, seed=seed) for seed in range(5, 13)], numbers(tokens, seed=20)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    wide = [t.float() for t in (x, residual, dense, room)]
    h = wide[1] + rms(wide[0], norms[0])
    found = layer.enter(x, residual, norms[0], norms[1:4], EPS)
    router = rms(h) * norms[3] * width**-0.5
    for own, right in zip(found, (h, rms(h, norms[1]), rms(h, norms[2]), router), strict=True):
        near(own, right.to(dtype), tolerance)
    mixed = (wide[3] * weights[..., None]).sum(dim=1)
    wanted = (wide[1] + rms(rms(wide[2], norms[4]) + rms(mixed, norms[5]), norms[6])) * scalars[:, None]
    out, normed = layer.leave(residual, dense, room, weights, norms[4:7], scalars, norms[7], EPS)
    near(out, wanted.to(dtype), tolerance)
    assert normed is not None
    near(normed, rms(wanted, norms[7]).to(dtype), tolerance)
    assert layer.leave(residual, dense, room, weights, norms[4:7], scalars, None, EPS)[1] is None
    near(layer.norm(x, norms[0], EPS), rms(x, norms[0]), tolerance)
