"""From weights to few bits: the scale of each group that makes the smallest squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .quantized import Quantized, pack_nibbles

TOP = {4: 7, 8: 127}  # the largest value
LOW = {4: -8, 8: -127}  # the smallest one
FP8_MAX = 448.0
# Where the search looks: a group's largest weight becomes minus this. Beyond `LOW` it is clipped.
TRIED = {4: (7.2, 7.6, 8.0, 8.4, 8.8, 9.3, 10.0, 11.5, 15.0), 8: (127.0, 128.5, 131.0, 135.0, 142.0, 155.0)}
# Scales are kept in 16 bits on disk. Values are found for the rounded scale, so nothing is lost by that.
STORED = torch.bfloat16
_TILE = 1 << 18  # weights at a time: what a core's own cache holds, several times over


def quantize(weight: Tensor, *, bits: int, group: int | None, search: bool = True) -> Quantized:
    """Rounds a weight to 4 or 8 bits.

    Without the search a group's largest weight becomes 7 (127), so no weight is off by more than half a step. With
    it, more scales are tried. In 4 bits there is one negative value more, so there the largest weight is put on the
    negative side, by a scale below zero if need be; some of the scales clip it and round the others more finely. Each
    is improved to the least-squares scale of the values that it gives, `sum(w q) / sum(q q)`, and the best is kept. A
    group's squared error is never above that without the search.

    Args:
        weight: [O, I] or [E, O, I], floating-point.
        group: inputs that share a scale; must divide I. None: one scale a row.

    Raises:
        ConfigError: the width does not suit.
    """
    assert bits in TOP, bits
    width = weight.shape[-1]
    if group is not None and (group < 1 or width % group):
        raise ConfigError(f"group: a width of {width} does not divide into groups of {group}")
    if bits == 4 and width % 2:
        raise ConfigError(f"a width of {width} is odd; 4-bit values are stored in pairs")
    rows = weight.reshape(-1, width)
    target = Quantized(
        bits=bits,
        group=group,
        data=weight.new_empty(len(rows), width * bits // 8, dtype=torch.uint8 if bits == 4 else torch.int8),
        scales=weight.new_empty(len(rows), width // group if group else 1, dtype=torch.float32),
    )
    step = max(1, _TILE // max(1, width))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        tile = rows[part].float().unflatten(-1, (-1, group or max(1, width)))
        scales = _scales(tile, bits, search)
        values = _round(tile, scales, bits).flatten(-2)
        target.data[part] = pack_nibbles(values) if bits == 4 else values.to(torch.int8)
        target.scales[part] = scales[..., 0]
    return _shaped(target, weight)


def to_fp8(weight: Tensor) -> Quantized:
    """Rounds a weight to FP8 (E4M3), one scale a row: the row's largest weight becomes 448.

    A floating-point value keeps its relative precision at every scale, so there is nothing to search for.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    data = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(len(rows), 1, device=weight.device)
    step = max(1, _TILE // max(1, rows.shape[-1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        tile = rows[part].float()
        scales[part] = _stored(tile.abs().amax(dim=-1, keepdim=True) / FP8_MAX)
        data[part] = (tile / scales[part]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return _shaped(Quantized(bits=8, group=None, data=data, scales=scales), weight)


def _scales(tile: Tensor, bits: int, search: bool) -> Tensor:
    """One scale a group: [R, G, g] -> [R, G, 1]."""
    largest = tile.gather(-1, tile.abs().argmax(dim=-1, keepdim=True))
    if not search:
        return _stored(largest.abs() / TOP[bits])
    # A power of two less or more changes no digit, and keeps the squares of tiny and huge weights in range.
    shift = torch.frexp(largest).exponent.clamp_(-120, 127)
    tile, largest = torch.ldexp(tile, -shift), torch.ldexp(largest, -shift)
    best = _stored(largest.abs() / TOP[bits])
    least = _error(tile, _round(tile, best, bits), best)
    for tried in TRIED[bits]:
        values = _round(tile, _stored(-largest / tried), bits)
        size = (values * values).sum(dim=-1, keepdim=True).clamp_(min=1.0)
        scale = _stored((tile * values).sum(dim=-1, keepdim=True) / size)
        error = _error(tile, values, scale)  # rounding anew to this scale can only make it less
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
    return _stored(torch.ldexp(best, shift))


def _round(tile: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest values, as floats."""
    return (tile / scales).round_().clamp_(LOW[bits], TOP[bits])


def _error(tile: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Squared error of each group."""
    return (tile - values * scale).square_().sum(dim=-1, keepdim=True)


def _stored(scale: Tensor) -> Tensor:
    """The scale as it will be on disk; that of a group of zeros is 1."""
    rounded = scale.to(STORED).float()
    return torch.where(rounded != 0, rounded, 1.0)


def _shaped(found: Quantized, weight: Tensor) -> Quantized:
    """Rows [R, ...] in the weight's own shape."""
    lead = weight.shape[:-1]
    return Quantized(
        bits=found.bits,
        group=found.group,
        data=found.data.view(*lead, -1),
        scales=found.scales.view(*lead, -1),
    )
