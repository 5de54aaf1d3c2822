"""Norms, residuals and rotary in one launch each, against the network's own modules."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, alike, near, numbers, weight

from dgemma.config import FULL, AttentionShape
from dgemma.kernels.triton import layer
from dgemma.kernels.triton.common import operand
from dgemma.kernels.triton.linear import Ready, ready
from dgemma.model.norm import RMSNorm
from dgemma.model.rope import inverse_frequencies, rotate, rotation

EPS = 1e-6


def rms(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The network's norm with a weight."""
    own = RMSNorm(x.shape[-1], EPS, scaled=weight is not None)
    if weight is not None:
        own.weight = torch.nn.Parameter(weight, requires_grad=False)
    return own(x).detach()


@pytest.mark.parametrize("own_values", [False, True])
@pytest.mark.parametrize(("width", "fraction"), [(8, 1.0), (24, 0.25), (256, 0.25)])
def test_heads(width: int, fraction: float, own_values: bool) -> None:
    """Queries and keys normalised and turned, values normalised, new entries in their pages and nothing else."""
    shape = AttentionShape(kind=FULL, heads=3, kv_heads=2, head_dim=width, theta=1e4, rotary_fraction=fraction)
    tokens, page = 5, 4
    queries, keys = numbers(tokens, 3, width), numbers(tokens, 2, width)
    one, two = numbers(width, seed=1), numbers(width, seed=2)
    positions = torch.arange(7, 7 + tokens, device=DEVICE)
    turn = rotation(positions, shape, torch.float32)
    slots = torch.tensor([-1, 9, 10, -1, 0], device=DEVICE)
    pool = tuple(torch.zeros(2, 3, 2, page, width, device=DEVICE))
    parts = [queries, keys, numbers(tokens, 2, width, seed=4)] if own_values else [queries, keys]
    found = layer.heads(
        torch.cat([part.flatten(1) for part in parts], dim=-1), 3, one, two,
        layer.turns(positions, inverse_frequencies(shape, DEVICE), torch.float32), EPS, slots=slots, pool=pool,
    )  # fmt: skip
    wanted = rotate(rms(queries, one), turn), rotate(rms(keys, two), turn), rms(parts[-1])
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
    norms, scalars = [numbers(width, seed=seed) for seed in range(5, 13)], numbers(2, seed=20)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    wide = [t.float() for t in (x, residual, dense, room)]
    h = wide[1] + rms(wide[0], norms[0])
    plain = operand(x)
    h_found, one, two, routed = layer.enter(x, residual, norms[0], norms[1:4], EPS, (plain, plain))
    found = h_found, one.values, two.values, routed
    router = rms(h) * norms[3] * width**-0.5
    for own, right in zip(found, (h, rms(h, norms[1]), rms(h, norms[2]), router), strict=True):
        near(own, right.to(dtype), tolerance)
    mixed = (wide[3] * weights[..., None]).sum(dim=1)
    wanted = (wide[1] + rms(rms(wide[2], norms[4]) + rms(mixed, norms[5]), norms[6])) * scalars[[0, 1, 1, 1]][:, None]
    out, normed = layer.leave(residual, dense, room, weights, norms[4:7], (scalars, 1), norms[7], EPS, plain)
    near(out, wanted.to(dtype), tolerance)
    near(normed.values, rms(wanted, norms[7]).to(dtype), tolerance)
    near(layer.norm(x, norms[0], EPS, plain).values, rms(x, norms[0]), tolerance)
    near(layer.norm(x, None, EPS, plain).values, rms(x), tolerance)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize(("encoded", "denoised"), [(3, 0), (0, 4), (2, 5)])
def test_what_a_step_begins_with(form: str, encoded: int, denoised: int) -> None:
    """Embeddings of encoded tokens and of canvases' at their spots, and self-conditioning around its products."""
    words, width, dtype = 30, 36, torch.bfloat16 if form == "bfloat16" else torch.float32
    table, norm = weight(form, words, width), numbers(width)
    tokens = torch.arange(encoded, device=DEVICE) * 7
    spots = torch.arange(denoised, device=DEVICE) * 5 % 8
    canvases, soft = torch.arange(8, device=DEVICE).view(2, 4) + 20, numbers(2, 4, width, dtype=dtype)
    plain = operand(numbers(7, width, dtype=dtype))
    x, normed = layer.embed(operand(table), 6.0, tokens, spots, canvases, soft, norm, EPS, plain)
    entries = table.float() if isinstance(table, torch.Tensor) else table.dequantize()
    near(x, (entries[torch.cat([tokens, 20 + spots])] * 6.0).to(dtype), 2**-8)
    if denoised:
        near(normed.values, rms(soft.flatten(0, 1)[spots], norm.to(dtype)), 2**-7)
        following = operand(weight("fp8", 7, width))
        own = layer.embed(operand(table), 6.0, tokens, spots, canvases, soft, norm, EPS, following)[1]
        near(own.scales, ready(normed.values, following).scales, 2e-6)
        before, more = x.clone(), numbers(denoised, width, dtype=dtype)
        layer.condition(x[encoded:], more, EPS)
        assert torch.equal(x[:encoded], before[:encoded])
        near(x[encoded:], rms(before[encoded:] + more), 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turns(dtype: torch.dtype) -> None:
    """Those of two kinds of layers in one launch, up to the end of a long context."""
    shapes = [
        AttentionShape(kind=FULL, heads=3, kv_heads=2, head_dim=width, theta=theta, rotary_fraction=fraction)
        for width, theta, fraction in ((24, 1e4, 0.25), (16, 1e6, 1.0))
    ]
    positions = torch.tensor([0, 1, 1000, 262_143], device=DEVICE)
    frequencies = torch.cat([inverse_frequencies(shape, DEVICE) for shape in shapes])
    found = layer.turns(positions, frequencies, dtype)
    wanted = zip(*(rotation(positions, shape, dtype) for shape in shapes), strict=True)
    for own, kinds in zip(found, wanted, strict=True):
        right = torch.cat([part[:, 0, : part.shape[-1] // 2] for part in kinds], dim=1)
        near(own, right, 1e-6 if dtype == torch.float32 else 2**-8)


def test_sound() -> None:
    """Rows with NaN or infinity anywhere are not."""
    x = numbers(5, 70)
    x[1, 69], x[2, 0], x[4, 3] = float("nan"), float("inf"), float("-inf")
    flags = torch.full((5,), 7, dtype=torch.uint8, device=DEVICE)
    layer.sound(x, flags)
    assert flags.tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("form", ["float32", "fp8", "int8", "int4-32"])
def test_what_goes_into_a_product(form: str) -> None:
    """Norms, gate and merge write what `ready` makes of their plain results."""
    width, following = 128, operand(weight(form, 7, 128))
    x, residual, norms = numbers(5, width), numbers(5, width, seed=1), [numbers(width, seed=n) for n in range(2, 9)]
    plain = operand(x)

    def same(found: Ready, wanted: Ready) -> None:
        near(found.scales.float(), wanted.scales.float(), 2e-6)
        if form == "fp8":
            alike(found.values, wanted.values)
        else:
            near(found.values, wanted.values, 2e-6)

    one = layer.norm(x, norms[0], EPS, plain).values
    same(layer.norm(x, norms[0], EPS, following), ready(one, following))
    wanted = layer.enter(x, residual, norms[0], norms[1:4], EPS, (plain, plain))
    found = layer.enter(x, residual, norms[0], norms[1:4], EPS, (following, following))
    for own, right in zip(found[1:3], wanted[1:3], strict=True):
        same(own, ready(right.values, following))
    parts, weights, scalars = numbers(5, 2, width), numbers(5, 2).softmax(dim=-1), numbers(2)
    given = residual, x, parts, weights, norms[4:7], (scalars, 3), norms[0], EPS
    same(layer.leave(*given, following)[1], ready(layer.leave(*given, plain)[1].values, following))
    both = numbers(5, 2 * width)
    gated = layer.gate(both, plain).values
    near(gated, torch.nn.functional.gelu(both[:, :width], approximate="tanh") * both[:, width:], 2e-6)
    same(layer.gate(both, following), ready(gated, following))
