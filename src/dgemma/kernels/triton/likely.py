"""What positions are restricted to of their words: the k likeliest, the smallest set of a probability, and those that
are not much less likely than the likeliest.

Sets are those of the words whose weights reach some least one, and that is found by halving the range of numbers that
it can be in, by their bits. No word is sorted, and words with equal weights are in a set together. Of bfloat16, whose
numbers have 8 bits, the least one is known to 11.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, Operand, power

# Weights relative to the largest are below 2, and below 2^-62 they are nothing.
HIGH, LOW = tl.constexpr(0x40000000), tl.constexpr(0x40000000 - (63 << 23))
ROUNDS = {torch.float32: 30, torch.bfloat16: 17, torch.float16: 20}


@triton.jit
def _weights(weights, ws, lifts, first, V, tile_count, SCALED: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr):
    """Some tiles of a row, relative to its largest weight: [TILES, BN]."""
    tiles = first + tl.arange(0, TILES)
    lines = tiles[:, None] * BN + tl.arange(0, BN)[None, :]
    value = tl.load(weights + lines, mask=lines < V, other=0.0).to(tl.float32)
    if SCALED:
        value = value / tl.load(ws + lines, mask=lines < V, other=1.0)
    return value * tl.load(lifts + tiles, mask=tiles < tile_count, other=0.0)[:, None]


@triton.jit
def _reached(
    weights, ws, lifts, least, V, tile_count, COUNTED: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """How many weights are no less than some number, or their sum."""
    total = tl.zeros((TILES,), tl.float32)
    for first in range(0, tile_count, TILES):
        value = _weights(weights, ws, lifts, first, V, tile_count, SCALED, TILES, BN)
        total += tl.sum(tl.where(value >= least, 1.0 if COUNTED else value, 0.0), 1)
    return tl.sum(total, 0)


@triton.jit
def _least(
    weights, ws, lifts, goal, low, V, tile_count, COUNTED: tl.constexpr, ROUNDS: tl.constexpr, SCALED: tl.constexpr,
    TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The bits of the largest number, from `low` on, that weights reach with a goal in number or sum."""
    high = low * 0 + HIGH
    for _ in range(ROUNDS):
        middle = low + (high - low) // 2
        least = middle.to(tl.float32, bitcast=True)
        reached = _reached(weights, ws, lifts, least, V, tile_count, COUNTED, SCALED, TILES, BN)
        low, high = tl.where(reached >= goal, middle, low), tl.where(reached >= goal, high, middle)
    return low


@triton.jit
def _likely_kernel(
    wanted, weights, ws, heats, lifts, peaks, totals, means, V, tile_count, cap,
    SHARED: tl.constexpr, SCALED: tl.constexpr, ROUNDS: tl.constexpr, BOUND: tl.constexpr, TOP: tl.constexpr,
    PADDED: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k, mass, share = tl.load(wanted + row * 3), tl.load(wanted + row * 3 + 1), tl.load(wanted + row * 3 + 2)
    if (k > 0.0) | (mass < 1.0) | (share > 0.0):
        weights, lifts = weights + row * V, lifts + row * tile_count
        peaks, totals, means = peaks + row * tile_count, totals + row * tile_count, means + row * tile_count
        lanes = tl.arange(0, PADDED)
        real = lanes < tile_count
        peak = tl.load(peaks + lanes, mask=real, other=float("-inf"))
        most = tl.max(peak, 0)
        lift = tl.exp2(tl.maximum(peak - most, -1e4))
        if SHARED:  # as `vocabulary` has written them
            bound = cap * LOG2_E / tl.load(heats + row)
            lift = tl.where(bound <= BOUND, tl.exp2(bound - TOP - most), lift)
        tl.store(lifts + lanes, lift, mask=real)
        tl.debug_barrier()  # every thread reads what others have written
        low = tl.full((), LOW, tl.int32)
        if k > 0.0:
            low = _least(weights, ws, lifts, k, low, V, tile_count, True, ROUNDS, SCALED, TILES, BN)
        if mass < 1.0:
            least = low.to(tl.float32, bitcast=True)
            goal = mass * _reached(weights, ws, lifts, least, V, tile_count, False, SCALED, TILES, BN)
            low = _least(weights, ws, lifts, goal, low, V, tile_count, False, ROUNDS, SCALED, TILES, BN)
        least = low.to(tl.float32, bitcast=True)
        if share > 0.0:  # of the largest as it is rounded in memory
            largest = tl.zeros((TILES,), tl.float32)
            for first in range(0, tile_count, TILES):
                value = _weights(weights, ws, lifts, first, V, tile_count, SCALED, TILES, BN)
                largest = tl.maximum(largest, tl.max(value, 1))
            least = tl.maximum(least, share * tl.max(largest, 0))
        for first in range(0, tile_count, TILES):
            value = _weights(weights, ws, lifts, first, V, tile_count, SCALED, TILES, BN)
            kept = value >= least
            tiles = first + tl.arange(0, TILES)
            lines = tiles[:, None] * BN + tl.arange(0, BN)[None, :]
            tl.store(weights + lines, 0.0, mask=(lines < V) & (value < least))
            inside = tiles < tile_count
            own = tl.load(peaks + tiles, mask=inside, other=float("-inf"))
            some = tl.max(kept.to(tl.int32), 1) > 0
            value = tl.where(kept, value * tl.exp2(tl.minimum(most - own, 126.0))[:, None], 0.0)
            logs = tl.where(value > 0.0, tl.log2(tl.where(value > 0.0, value, 1.0)), 0.0)
            total = tl.load(totals + tiles, mask=inside, other=0.0)
            tl.store(totals + tiles, tl.where(total == total, tl.sum(value, 1), total), mask=inside)
            tl.store(means + tiles, tl.sum(value * logs, 1), mask=inside)
            tl.store(peaks + tiles, tl.where(some | (total != total), own, float("-inf")), mask=inside)


def keep_likely(
    wanted: Tensor,
    weights: Tensor,
    table: Operand,
    heats: Tensor,
    found_in: Tensor,
    cap: float | None,
    width: int,
    *,
    shared: bool,
    bound: float,
    top: float,
) -> None:
    """Makes nothing of the weights [n, V] of words that positions are not to have, and of their tiles what is left.

    Args:
        wanted: float32 [n, 3]: how many words (0: all); the probability that they have together (1: all); the share of
            the likeliest one's that each has (0: all). In this order: each restricts what is left.
        found_in: float32 [4, n, tiles]: largest score, sum of weights, their weighted logarithms and word of each tile.
        width: words of a tile.
        shared, bound, top: whether weights have one reference a position, as `vocabulary` says.
    """
    (n, words), count = weights.shape, found_in.shape[-1]
    peaks, totals, means, _ = found_in
    _likely_kernel[(n,)](
        wanted, weights, table.scales, heats, torch.empty_like(peaks), peaks, totals, means, words, count, cap or 0.0,
        SHARED=shared, SCALED=table.form != "float", ROUNDS=ROUNDS[weights.dtype], BOUND=bound, TOP=top,
        PADDED=power(count), TILES=16, BN=width, num_warps=8,
    )  # fmt: skip
