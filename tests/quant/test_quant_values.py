"""Values and scales: against plain arithmetic, and against bounds that follow from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.errors import ConfigError
from dgemma.quant import ErrorSum, Quantized, quantize, to_fp8

GROUPS = (None, 8, 16, 32, 64)


def plain(matrix: Quantized) -> torch.Tensor:
    """Dequantised value by value, as the docstring says it."""
    flat = matrix.data.reshape(-1, matrix.data.shape[-1])
    scales = matrix.scales.reshape(len(flat), -1)
    width = matrix.shape[-1]
    size = matrix.group or width
    result = torch.empty(len(flat), width)
    for row in range(len(flat)):
        for column in range(width):
            if matrix.bits == 4:
                byte = int(flat[row, column // 2])
                value = (byte >> 4 if column % 2 else byte & 15) - 8
            else:
                value = int(flat[row, column])
            result[row, column] = value * scales[row, column // size]
    return result.view(matrix.shape)


def random(*shape: int, tails: bool = False, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight**3 if tails else weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 16, 32])
def test_dequantised_value_by_value(bits: int, group: int | None) -> None:
    matrix = quantize(random(2, 5, 96), bits=bits, group=group)
    assert matrix.shape == (2, 5, 96) and matrix.data.shape == (2, 5, 96 * bits // 8)
    assert matrix.scales.shape == (2, 5, 96 // group if group else 1)
    assert torch.equal(matrix.dequantize(), plain(matrix))
    assert torch.equal(matrix[1].dequantize(), matrix.dequantize()[1])
    assert torch.equal(matrix[1, 2:4].dequantize(), matrix.dequantize()[1, 2:4])
    rows = torch.tensor([[4, 0], [2, 2]])
    assert torch.equal(matrix[0][rows].dequantize(), matrix[0].dequantize()[rows])
    assert matrix.nbytes == 2 * 5 * (96 * bits // 8 + 4 * (96 // group if group else 1))


@pytest.mark.parametrize("bits", [4, 8])
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.sampled_from(GROUPS),
    scale=st.floats(-25, 30),
    seed=st.integers(0, 999),
    tails=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bounds(bits: int, rows: int, groups: int, group: int | None, scale: float, seed: int, tails: bool) -> None:
    """Without the search each weight is within half a step of its value, a step being its group's largest over 7 or
    127; with it no group's squared error is larger."""
    width = groups * (group or 24)
    weight = random(rows, width, tails=tails, seed=seed) * 10**scale
    step = weight.unflatten(-1, (-1, group or width)).abs().amax(dim=-1, keepdim=True) / (7 if bits == 4 else 127)
    found = quantize(weight, bits=bits, group=group, search=False)
    off = (weight - found.dequantize()).unflatten(-1, (-1, group or width)).abs()
    assert bool((off <= step * 0.5 * (1 + 2**-7)).all())  # scales are rounded to bfloat16
    searched = quantize(weight, bits=bits, group=group)
    better = (weight - searched.dequantize()).unflatten(-1, (-1, group or width)).double()
    assert bool((better.square().sum(-1) <= off.double().square().sum(-1) * (1 + 1e-5)).all())


@pytest.mark.parametrize(("bits", "group", "gain"), [(4, 64, 0.86), (4, 32, 0.87), (4, None, 0.77), (8, None, 1.0)])
def test_what_the_search_is_worth(bits: int, group: int | None, gain: float) -> None:
    """Normal weights: the error that theory gives to uniform steps, less what the search finds."""
    weight = random(256, 1024)
    before, after = ErrorSum(), ErrorSum()
    before.add(weight, quantize(weight, bits=bits, group=group, search=False), 0)
    after.add(weight, quantize(weight, bits=bits, group=group), 0)
    size = group or 1024
    largest = weight.unflatten(-1, (-1, size)).abs().amax(dim=-1)
    uniform = float(((largest / (7 if bits == 4 else 127)) ** 2).mean().sqrt()) / math.sqrt(12)
    assert before.relative == pytest.approx(uniform, rel=0.03)
    assert after.relative < gain * before.relative
    assert after.weights == weight.numel()


def test_the_best_of_all_scales_is_hardly_better() -> None:
    """Beside a search through a thousand scales of either sign."""
    weight = random(16, 64, tails=False, seed=5)
    largest = weight.abs().amax(dim=-1, keepdim=True)
    least = torch.full((16, 1), torch.inf)
    for sign in (-1, 1):
        for divisor in torch.linspace(6, 20, 500):
            scale = sign * largest / divisor
            error = (weight - (weight / scale).round().clamp(-8, 7) * scale).square().sum(-1, keepdim=True)
            least = torch.minimum(least, error)
    found = quantize(weight, bits=4, group=64)
    assert float((weight - found.dequantize()).square().sum()) < 1.03 * float(least.sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_nothing_and_of_almost_nothing(bits: int) -> None:
    weight = torch.zeros(4, 64)
    weight[1] = 1e-40
    weight[2, 5] = -3.0
    weight[3] = 3e38
    found = quantize(weight, bits=bits, group=32)
    assert torch.equal(found[0].dequantize(), weight[0])
    assert bool(torch.isfinite(found.dequantize()).all()) and bool((found.scales != 0).all())
    assert torch.allclose(found[2].dequantize(), weight[2], rtol=2**-8)
    assert torch.allclose(found[3].dequantize(), weight[3], rtol=2**-8)


def test_scales_survive_sixteen_bits() -> None:
    """They go to disk as bfloat16: nothing may be lost by that."""
    for found in (quantize(random(8, 64), bits=4, group=32), quantize(random(8, 64), bits=8, group=None)):
        assert torch.equal(found.scales.bfloat16().float(), found.scales)


def test_integer_weights_come_back() -> None:
    """Weights that are whole multiples of a step are exact."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-7, 8, (64, 64), generator=generator).float() * 0.5
    weight[:, ::32] = 3.5
    assert torch.equal(quantize(weight, bits=4, group=32).dequantize(), weight)


def test_fp8() -> None:
    """Relative error of three mantissa bits, the largest weight of each row at 448."""
    weight = random(32, 100, tails=True) * 1e-3
    found = to_fp8(weight)
    assert found.floating and found.bits == 8 and found.group is None
    assert torch.equal(found.dequantize(), found.data.float() * found.scales)
    large = weight.abs() > found.scales * 2**-6  # below that E4M3 has fewer bits
    off = (found.dequantize() - weight).abs() / weight.abs()
    assert float(off[large].max()) <= 2**-4
    assert bool((found.data.float().abs().amax(dim=-1) >= 416).all())
    assert bool(torch.isfinite(to_fp8(torch.zeros(2, 8)).dequantize()).all())


def test_large_matrices_are_rounded_tile_by_tile() -> None:
    """The same as row by row."""
    weight = random(3000, 512)
    whole = quantize(weight, bits=4, group=64)
    assert all(
        torch.equal(whole[i].data, quantize(weight[i : i + 1], bits=4, group=64)[0].data) for i in (0, 2047, 2999)
    )
    assert torch.equal(to_fp8(weight)[2999].data.float(), to_fp8(weight[2999:])[0].data.float())


def test_widths_that_do_not_suit() -> None:
    with pytest.raises(ConfigError, match="48 does not divide into groups of 32"):
        quantize(random(2, 48), bits=4, group=32)
    with pytest.raises(ConfigError, match="15 is odd"):
        quantize(random(2, 15), bits=4, group=None)
    assert quantize(random(2, 15), bits=8, group=None).shape == (2, 15)
