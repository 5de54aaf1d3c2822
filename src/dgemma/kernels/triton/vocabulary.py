"""The vocabulary step: scores against the table, what is found in them, and the table's rows blended by them.

1. *scores*: a program has some positions and a tile of words. It keeps what the tile says of each position (largest
   score, its word, the sum of weights exp(score - largest), their weighted logarithms) and writes the weights in the
   activations' dtype, times their words' scales where the table has some. No score goes to memory.
2. *merge*: one program a position puts its tiles together: argmax, entropy, the tile that holds the sample and the
   word in it; and each tile's factor, which turns its weights into probabilities. Tiles with next to nothing of a
   position's weight get the factor 0.
   Positions that are restricted to likely words have been so before (`likely.py`).
3. *live*: for each block of positions, the tiles in which any has a factor.
4. *blend*: probabilities times the table, over the live tiles alone. The tiles are split among programs, each of which
   writes a part.

A soft-cap bounds scores on both sides. Where bfloat16's exponent holds all that lies between, at any temperature above
0.38 for a cap of 30, a position's weights are all written relative to one number that is known before the largest
score is, and the blend is a product and nothing else. Else each tile has its own, and weights meet factors on their way
into the product. In float32 it is always so: there a position's result does not depend on the others', while in
bfloat16 a tile that another position of its block needs adds what it has, which is below the tolerance.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized
from ..belief import Belief
from . import tiles
from .common import LOG2_E, dot, narrow, operand, power, scaled, widen
from .likely import keep_likely
from .linear import ready

# Of scores in units of log 2: a bound up to which weights have one reference, and the largest weight's exponent then.
# The smallest one's is 100 - 2 * 113, and products of the largest with all words of a table stay finite.
BOUND, TOP = tl.constexpr(113.0), tl.constexpr(100.0)
NOWHERE = tl.constexpr(2**31 - 1)  # behind every word


class Peers(Protocol):
    """Processes that have the table in parts, each some of its words in order: `model.ranks.Ranks`."""

    @property
    def rank(self) -> int:
        """Which of them this one is."""

    @property
    def word_counts(self) -> list[int]:
        """How many words each has."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x."""

    def gathered(self, x: Tensor) -> Tensor:
        """Every rank's x: [ranks, ...]."""


class Step(NamedTuple):
    """What the step finds of n positions.

    Fields:
        found: words and entropies.
        parts: float32 [S, n, H], whose sum is the blend; None unless asked for.
        taken: int32, pairs of a position and a tile that took part in it, by block of positions.
        pairs: all there are.
    """

    found: Belief
    parts: Tensor | None
    taken: Tensor
    pairs: int

    @property
    def soft(self) -> Tensor | None:
        """The blend, float32 [n, H]."""
        return None if self.parts is None else self.parts.sum(dim=0)

    @property
    def share(self) -> Tensor:
        """Of all pairs, those that took part: a tensor of one number, so that nothing waits for it."""
        return self.taken.sum() / max(1, self.pairs)


@triton.jit
def _scores_kernel(
    x, xs, w, ws, heats, barred, bias_words, biases, ends, weights, peaks, totals, means, words, n, V, K, cap,
    bias_count, end_count, pitch, before, FORM: tl.constexpr, CAPPED: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Positions are on the product's left and words on its right, so that what is summed over words is mostly one
    # thread's own. Neighbouring programs take the same words.
    tall = tl.cdiv(n, BM)
    tile = tl.program_id(0) // tall
    rows = tl.program_id(0) % tall * BM + tl.arange(0, BM)
    lines = tile * BN + tl.arange(0, BN)
    seen, real = rows < n, lines < V
    score = tl.zeros((BM, BN), tl.float32)
    x_rows, w_rows = rows.to(tl.int64)[:, None] * K, lines.to(tl.int64)[:, None] * K
    for first in range(0, K, BK):
        inner = first + tl.arange(0, BK)[None, :]
        value = tl.load(x + x_rows + inner, mask=seen[:, None] & (inner < K), other=0.0)
        weight = tl.load(w + w_rows + inner, mask=real[:, None] & (inner < K), other=0.0)
        score = dot(value, tl.trans(widen(weight, value.dtype)), score)
    if FORM != "float":
        score *= tl.load(ws + lines, mask=real, other=0.0)[None, :]
    if FORM == "fp8":
        score *= tl.load(xs + rows, mask=seen, other=0.0)[:, None]
    broken = tl.sum(score * 0.0, 1)  # no number if one of them is none or infinite
    # From here on scores are in units of log 2, which are what the card exponentiates.
    heat = LOG2_E / tl.load(heats + rows, mask=seen, other=1.0)[:, None]
    if CAPPED:
        score = cap - 2.0 * cap / (tl.exp2(score * (2.0 * LOG2_E / cap)) + 1.0)
    score *= heat
    for number in range(bias_count):
        word, value = tl.load(bias_words + number), tl.load(biases + number)
        score += tl.where(lines + before == word, value, 0.0)[None, :] * heat
    for number in range(end_count):
        word, refused = tl.load(ends + number), tl.load(barred + rows, mask=seen, other=0) != 0
        score = tl.where((lines + before == word)[None, :] & refused[:, None], float("-inf"), score)
    score = tl.where(real[None, :], score, float("-inf"))
    peak = tl.max(score, 1)
    word = tl.min(tl.where(score == peak[:, None], lines[None, :], V - 1), 1)
    logs = tl.maximum(score - tl.where(peak == float("-inf"), 0.0, peak)[:, None], -1e4)
    weight = tl.exp2(logs)
    stored = weight
    if SHARED:
        stored *= tl.exp2(tl.where(cap * heat <= BOUND, peak[:, None] - cap * heat + TOP, 0.0))
    if FORM != "float":
        stored *= tl.load(ws + lines, mask=real, other=0.0)[None, :]
    there = rows[:, None] * V + lines[None, :]
    tl.store(weights + there, narrow(stored, weights.dtype.element_ty), mask=seen[:, None] & real[None, :])
    spot = rows * pitch + tile
    tl.store(peaks + spot, peak, mask=seen)
    tl.store(totals + spot, tl.sum(weight, 1) + broken, mask=seen)
    tl.store(means + spot, tl.sum(weight * logs, 1), mask=seen)
    tl.store(words + spot, word + before, mask=seen)


@triton.jit
def _merge_kernel(
    weights, ws, heats, peaks, totals, means, words, uniforms, factors, norms, argmaxes, samples, entropies, V,
    tile_count, first, before, least, cap,
    SHARED: tl.constexpr, SCALED: tl.constexpr, SAMPLED: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, PADDED)
    real, spot = lanes < tile_count, row * tile_count + lanes
    peak = tl.load(peaks + spot, mask=real, other=float("-inf"))
    own = tl.load(totals + spot, mask=real, other=0.0)
    broken = tl.max((own != own).to(tl.int32), 0) != 0
    most = tl.max(peak, 0)
    gap = tl.maximum(peak - most, -1e4)
    share = tl.where(real & (peak > float("-inf")), tl.exp2(gap), 0.0)
    mass = own * share
    total = tl.sum(mass, 0)
    mean = tl.sum(share * tl.load(means + spot, mask=real, other=0.0) + mass * gap, 0)
    best = tl.min(tl.where(peak == most, tl.load(words + spot, mask=real, other=0), NOWHERE), 0)
    best = tl.where(broken, 0, best)
    tl.store(argmaxes + row, best.to(tl.int64))
    tl.store(entropies + row, tl.where(broken, float("nan"), (tl.log2(total) - mean / total) / LOG2_E))
    factor, norm = share / total, 0.0
    if SHARED:
        bound = cap * LOG2_E / tl.load(heats + row)
        norm = tl.where(bound <= BOUND, tl.exp2(bound - TOP - most) / total, 0.0)
        factor = tl.where(bound <= BOUND, norm, factor)
    tl.store(norms + row, norm)
    tl.store(factors + spot, tl.where(mass > least * total, factor, 0.0), mask=real)
    if SAMPLED:
        ends = tl.cumsum(mass, 0)
        target = tl.load(uniforms + row) * tl.max(ends, 0)
        last = tl.max(tl.where(mass > 0.0, lanes, 0), 0)  # rounding must not carry it to where no weight is
        tile = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
        inside = tl.maximum(target - tl.sum(tl.where(lanes < tile, mass, 0.0), 0), 0.0)
        inside = inside / tl.sum(tl.where(lanes == tile, mass, 0.0), 0)
        line = (tile - first) * BN + tl.arange(0, BN)
        ours = (line >= 0) & (line < V)  # nothing: another rank finds the word
        weight = tl.load(weights + row * V + line, mask=ours, other=0.0).to(tl.float32)
        if SCALED:
            weight = weight / tl.load(ws + line, mask=ours, other=1.0)
        ends = tl.cumsum(weight, 0)
        last = tl.max(tl.where(weight > 0.0, tl.arange(0, BN), 0), 0)
        word = tl.minimum(tl.sum((ends <= inside * tl.max(ends, 0)).to(tl.int32), 0), last)
        word = tl.where(tl.max(ours.to(tl.int32), 0) == 0, 0, word + (tile - first) * BN + before)
        tl.store(samples + row, tl.where(broken, 0, word).to(tl.int64))


@triton.jit
def _live_kernel(
    factors, live, counts, taken, n, tile_count, BM: tl.constexpr, STEP: tl.constexpr, PADDED: tl.constexpr
):
    block = tl.program_id(0)
    lanes = tl.arange(0, PADDED)
    users = tl.zeros((PADDED,), tl.int32)
    for first in range(block * BM, tl.minimum(n, block * BM + BM), STEP):
        rows = first + tl.arange(0, STEP)
        there = factors + rows.to(tl.int64)[:, None] * tile_count + lanes[None, :]
        factor = tl.load(there, mask=(rows < n)[:, None] & (lanes < tile_count)[None, :], other=0.0)
        users += tl.sum((factor != 0.0).to(tl.int32), 0)
    used = (users > 0).to(tl.int32)
    tl.store(live + block * tile_count + tl.cumsum(used, 0) - 1, lanes, mask=users > 0)
    tl.store(counts + block, tl.sum(used, 0))
    tl.store(taken + block, tl.sum(users, 0))


@triton.jit
def _blend_kernel(
    weights, factors, norms, live, counts, w, parts, n, V, H, tile_count,
    SHARED: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(1), tl.program_id(2)
    rows = block * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BH + tl.arange(0, BH)
    seen, wide = (rows < n)[:, None], (columns < H)[None, :]
    steps = tl.load(counts + block) * (BN // BK)  # a tile of words is taken in some steps
    each = tl.cdiv(steps, SPLITS)
    begin, end = split * each, tl.minimum((split + 1) * each, steps)
    acc = tl.zeros((BM, BH), tl.float32)
    norm = tl.load(norms + rows, mask=rows < n, other=1.0)
    shared = False
    if SHARED:
        shared = tl.min(norm, 0) > 0.0
    if shared:
        for number in range(begin, end):
            tile = tl.load(live + block * tile_count + number // (BN // BK))
            lines = tile * BN + number % (BN // BK) * BK + tl.arange(0, BK)
            weight = tl.load(weights + rows[:, None] * V + lines[None, :], mask=seen & (lines < V)[None, :], other=0.0)
            entry = tl.load(w + lines[:, None] * H + columns[None, :], mask=(lines < V)[:, None] & wide, other=0.0)
            acc = dot(weight, widen(entry, weight.dtype), acc)
        acc = acc * norm[:, None]
    else:
        for number in range(begin, end):
            tile = tl.load(live + block * tile_count + number // (BN // BK))
            lines = tile * BN + number % (BN // BK) * BK + tl.arange(0, BK)
            weight = tl.load(weights + rows[:, None] * V + lines[None, :], mask=seen & (lines < V)[None, :], other=0.0)
            entry = tl.load(w + lines[:, None] * H + columns[None, :], mask=(lines < V)[:, None] & wide, other=0.0)
            factor = tl.load(factors + rows * tile_count + tile, mask=rows < n, other=0.0)
            acc = dot(scaled(weight, factor[:, None]), widen(entry, weight.dtype), acc)
    there = (split * n + rows).to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(parts + there, acc, mask=seen & wide)


def step(
    hidden: Tensor,
    table: Tensor | Quantized,
    *,
    heats: Tensor,
    cap: float | None,
    tolerance: float,
    uniform: Tensor | None = None,
    barred: Tensor | None = None,
    ends: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    soft: bool = True,
    peers: Peers | None = None,
    likely: Tensor | None = None,
) -> Step:
    """Hidden states [n, H] against a table [V, H] of floats, FP8 or 8 bits with a scale a row.

    n * V and V * H are below 2^31.

    Positions may be those of several requests: each has its own temperature. The sample is the first word whose
    cumulative weight is above the position's share of the total, weights within a tile of words as rounded in memory.

    Args:
        heats: float32, n in all, what scores are divided by.
        cap: soft-cap; None: no cap.
        tolerance: the share of a position's weight that its blend may leave out.
        uniform: float32 [n] in [0, 1); None: the likeliest.
        barred: int8 [n], 1 where the words `ends` (int64) are refused.
        bias: int64 words and the float32 numbers that are added to their scores.
        peers: where the table is one's part of a larger one; all call this at once, and find the same.
        likely: what positions are restricted to, see `likely.keep_likely`; not with peers.
    """
    own = operand(table)
    n, (words, width), device = len(hidden), own.shape, hidden.device
    assert max(n, width) * words < 1 << 31
    tile = tiles.vocabulary(n, own.form, hidden.itemsize)
    count = triton.cdiv(words, tile.columns)
    weights = torch.empty(n, words, dtype=hidden.dtype, device=device)
    shared = cap is not None and bias is None and hidden.dtype != torch.float32
    argmax, entropies = torch.empty(n, dtype=torch.int64, device=device), torch.empty(n, device=device)
    sampled = argmax if uniform is None else torch.empty_like(argmax)
    found = Belief(argmax, sampled, entropies)
    if not n:
        return Step(found, torch.empty(1, 0, width, device=device) if soft else None, argmax[:0], 0)
    heats, uniform = heats.contiguous(), None if uniform is None else uniform.contiguous()
    ends = argmax[:0] if ends is None else ends
    barred = torch.empty(0, dtype=torch.int8, device=device) if barred is None else barred
    bias_words, biases = (argmax[:0], entropies[:0]) if bias is None else bias
    value, scales = ready(hidden, own)
    counts_of = [words] if peers is None else peers.word_counts
    pitch, place = triton.cdiv(max(counts_of), tile.columns), 0 if peers is None else peers.rank
    before = sum(counts_of[:place])
    # Largest score, sum of weights, their weighted logarithms and likeliest word of each tile; ranks have room for as
    # many tiles as the one with most words, and the last may be nobody's.
    found_in = torch.empty(4, n, pitch, device=device)
    if count < pitch:
        found_in[0, :, count:], found_in[1:, :, count:] = float("-inf"), 0.0
    peaks, totals, means, best = found_in
    _scores_kernel[(triton.cdiv(n, tile.rows) * count,)](
        value, scales, own.data, own.scales, heats, barred, bias_words, biases, ends, weights, peaks, totals, means,
        best.view(torch.int32), n, words, width, cap or 0.0, len(bias_words), len(ends), pitch, before,
        FORM=own.form, CAPPED=cap is not None, SHARED=shared, BM=tile.rows, BN=tile.columns, BK=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if likely is not None:
        assert peers is None
        keep_likely(
            likely, weights, own, heats, found_in, cap, tile.columns,
            shared=shared, bound=BOUND.value, top=TOP.value,
        )  # fmt: skip
    if peers is not None:
        found_in = peers.gathered(found_in).permute(1, 2, 0, 3).flatten(2).contiguous()
    (peaks, totals, means, best), everyone = found_in, found_in.shape[-1]
    norms, factors = torch.empty(n, device=device), torch.empty(n, everyone, device=device)
    _merge_kernel[(n,)](
        weights, own.scales, heats, peaks, totals, means, best.view(torch.int32),
        entropies if uniform is None else uniform, factors, norms, argmax, sampled, entropies, words, everyone,
        place * pitch, before, tolerance / everyone, cap or 0.0, SHARED=shared, SCALED=own.form != "float",
        SAMPLED=uniform is not None, PADDED=power(everyone), BN=tile.columns, num_warps=4,
    )  # fmt: skip
    if peers is not None:
        factors = factors[:, place * pitch : place * pitch + count].contiguous()
        if uniform is not None:  # the word is 0 wherever its tile is another rank's
            found = found._replace(sampled=peers.total(sampled))
    if not soft:
        return Step(found, None, argmax[:0], n * count)
    blend = tiles.blend(n, hidden.itemsize)
    blocks, wide = triton.cdiv(n, blend.rows), triton.cdiv(width, blend.columns)
    splits = max(1, min(tiles.programs() // (blocks * wide), count))
    live = torch.empty(blocks, count, dtype=torch.int32, device=device)
    counts, taken = torch.empty(2, blocks, dtype=torch.int32, device=device)
    _live_kernel[(blocks,)](
        factors, live, counts, taken, n, count, BM=blend.rows, STEP=16, PADDED=power(count), num_warps=16
    )
    parts = torch.empty(splits, n, width, device=device)
    _blend_kernel[(wide, blocks, splits)](
        weights, factors, norms, live, counts, own.data, parts, n, words, width, count,
        SHARED=shared, SPLITS=splits, BM=blend.rows, BN=tile.columns, BH=blend.columns, BK=blend.inner,
        num_warps=blend.warps, num_stages=blend.stages,
    )  # fmt: skip
    if peers is not None:
        parts = peers.total(parts.sum(dim=0))[None]
    return Step(found, parts, taken, n * count)
