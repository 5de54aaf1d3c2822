"""Attention of many requests over keys and values in pages: canvases that look both ways, and causal prefill.

A query may see the page entries from `low` to `high` of its request; a canvas's queries also see the canvas's own keys
and values, which are in no page. That is all that differs between canvases, prompts, full and sliding layers:

| | low | high | own keys |
|---|---|---|---|
| canvas at `start` | max(0, start - window + 1), or 0 | start - 1 | all of the canvas |
| encoded query at p | max(0, p - window + 1), or 0 | p | none: they are in the pages |

A program takes some queries with all heads that share a key head, and a part of the keys. Where keys are split among
programs, each leaves behind what its part would give alone, rounded, with the sum of its weights and the score that
they are relative to, and a second launch merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import LOG2_E, Operand, dot, narrow, power, put
from .linear import Ready, ready, room


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who sees what in one forward, for layers of one kind; made on the host, constant for the whole forward.

    Fields:
        segments: int32 [R, 4]: the first row, the number of rows, the first one's position, 1 where they are encoded.
        blocks: int32 [N, 2]: a segment and a block of its rows; a segment of -1: nothing to do (a graph's fill).
        pages: int32 [R, M], each request's pages in order; anything where they are behind the window.
        window: None in full layers.
        block: rows of a block.
        splits: parts that keys are split in.
    """

    segments: Tensor
    blocks: Tensor
    pages: Tensor
    window: int | None
    block: int
    splits: int

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        segments, blocks, pages = (t.to(device, non_blocking=True) for t in (self.segments, self.blocks, self.pages))
        return replace(self, segments=segments, blocks=blocks, pages=pages)


def plan(
    segments: Sequence[tuple[int, int, bool]],
    pages: Sequence[Sequence[int | None]],
    *,
    group: int,
    head_dim: int,
    kv_heads: int,
    window: int | None,
    device: torch.device | str,
    splits: int | None = None,
    pitch: int | None = None,
    columns: int = 1,
) -> Plan:
    """Lays a forward out.

    Args:
        segments: (position of the first token, how many, whether they are encoded), in the order of the rows.
        pages: of each segment's request in this kind of layer.
        group: query heads to a key head.
        splits: parts to split keys in; None: a power of two of them, to give each multiprocessor of a card something.
        pitch: rows that each segment has, its tokens first; None: as many as tokens.
        columns: pages that there is room for at least.
    """
    block = max(1, tiles.attention(head_dim).rows // power(group))
    rows, blocks, first = [], [], 0
    for number, (start, length, encoded) in enumerate(segments):
        rows.append((first, length, start, int(encoded)))
        for part in range(-(-(pitch or length) // block)):
            blocks.append((number, part) if part * block < length else (-1, 0))
        first += pitch or length
    if splits is None:
        longest = max(min(start, window or start) + length for start, length, _ in segments)
        programs = len(blocks) * kv_heads
        most_parts = min(tiles.PROGRAMS // programs, longest // tiles.least_keys(head_dim))
        splits = 1 << max(1, most_parts).bit_length() - 1
    most = max(columns, *(len(own) for own in pages))
    table = [[0 if page is None else page for page in own] + [0] * (most - len(own)) for own in pages]
    return Plan(
        segments=torch.tensor(rows, dtype=torch.int32).to(device, non_blocking=True),
        blocks=torch.tensor(blocks, dtype=torch.int32).to(device, non_blocking=True),
        pages=torch.tensor(table, dtype=torch.int32).to(device, non_blocking=True),
        window=window,
        block=block,
        splits=splits,
    )


@triton.jit
def _step(query, key, value, edge, visible, highest, total, mixed):
    """A tile of keys [BK, D] and values: the running softmax of flash attention, in units of log 2; the scale is 1.

    Weights are relative to the highest score when that was last taken over: sums are scaled anew only when some row's
    has grown by more than 8, so weights are at most 256. `edge`: whether not all keys are visible to all rows.
    """
    score = dot(query, tl.trans(key), tl.zeros((query.shape[0], key.shape[0]), tl.float32))
    # Of 64 rows both halves of a program have all scores; for the sake of a branch Triton would have them exchanged.
    if query.shape[0] <= 64:  # noqa: SIM114
        score = tl.where(visible, score, float("-inf"))
    elif edge:
        score = tl.where(visible, score, float("-inf"))
    peak = tl.max(score, 1) * LOG2_E
    grown = peak > highest + 8.0
    if tl.max(grown.to(tl.int32), 0) != 0:
        peak = tl.where(grown, peak, highest)
        shrink = tl.where(grown, tl.exp2(highest - peak), 1.0)
        highest, total, mixed = peak, total * shrink, mixed * shrink[:, None]
    base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weight = tl.exp2(score * LOG2_E - base[:, None])
    return highest, total + tl.sum(weight, 1), dot(narrow(weight, value.dtype), value, mixed)


@triton.jit
def _attend_kernel(
    queries, keys, values, pool_keys, pool_values, segments, blocks, pages, out, peaks, sums, window, most,
    heads, kv_heads, rows_in_all, D,
    GROUP: tl.constexpr, LANES: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PAGE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    kv = tl.program_id(1)
    split = tl.program_id(2)
    segment = tl.load(blocks + tl.program_id(0) * 2)
    if segment >= 0:
        row = tl.load(segments + segment * 4)
        length = tl.load(segments + segment * 4 + 1)
        start = tl.load(segments + segment * 4 + 2)
        encoded = tl.load(segments + segment * 4 + 3) != 0

        # A program's rows are pairs of a query and one of the heads that share this key head.
        first_query = tl.load(blocks + tl.program_id(0) * 2 + 1) * BQ
        lanes = tl.arange(0, BQ * LANES)
        spots = first_query + lanes // LANES
        real = (spots < length) & (lanes % LANES < GROUP)
        width = tl.arange(0, BD)
        wide = width < D
        head = kv * GROUP + lanes % LANES
        places = (row + spots).to(tl.int64) * heads + head
        there = places[:, None] * D + width[None, :]
        query = tl.load(queries + there, mask=real[:, None] & wide[None, :], other=0.0)

        high = tl.where(encoded, start + spots, start - 1)
        low = tl.maximum(0, tl.where(encoded, start + spots, start) - window + 1)
        begin = tl.maximum(0, tl.where(encoded, start + first_query, start) - window + 1) // BK * BK
        end = tl.where(encoded, start + tl.minimum(length, first_query + BQ), start)
        committed = tl.cdiv(tl.maximum(end - begin, 0), BK)
        own = tl.where(encoded, 0, tl.cdiv(length, BK))
        each = tl.cdiv(committed + own, SPLITS)
        from_tile, to_tile = split * each, tl.minimum((split + 1) * each, committed + own)

        all_from, all_to = tl.max(low, 0), tl.min(high, 0)  # what every row sees
        highest = tl.full((BQ * LANES,), float("-inf"), tl.float32)
        total = tl.zeros((BQ * LANES,), tl.float32)
        mixed = tl.zeros((BQ * LANES, BD), tl.float32)
        for tile in range(from_tile, tl.minimum(to_tile, committed)):
            first = begin + tile * BK
            position = first + tl.arange(0, BK)
            inside = position < end
            if PAGE % BK == 0:  # one page has the whole tile
                page = tl.load(pages + segment * most + first // PAGE).to(tl.int64)
                entry = (page * kv_heads + kv) * PAGE + position % PAGE
            else:
                page = tl.load(pages + segment * most + position // PAGE, mask=inside, other=0).to(tl.int64)
                entry = (page * kv_heads + kv) * PAGE + position % PAGE
            here = entry[:, None] * D + width[None, :]
            key = tl.load(pool_keys + here, mask=inside[:, None] & wide[None, :], other=0.0)
            value = tl.load(pool_values + here, mask=inside[:, None] & wide[None, :], other=0.0)
            visible = (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
            edge = (first < all_from) | (first + BK > all_to + 1)
            highest, total, mixed = _step(query, key, value, edge, visible, highest, total, mixed)
        for tile in range(tl.maximum(from_tile, committed), to_tile):
            first = (tile - committed) * BK
            spot = first + tl.arange(0, BK)
            here = ((row + spot).to(tl.int64) * kv_heads + kv)[:, None] * D + width[None, :]
            key = tl.load(keys + here, mask=(spot < length)[:, None] & wide[None, :], other=0.0)
            value = tl.load(values + here, mask=(spot < length)[:, None] & wide[None, :], other=0.0)
            edge, visible = first + BK > length, (spot < length)[None, :]
            highest, total, mixed = _step(query, key, value, edge, visible, highest, total, mixed)

        mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        part = split.to(tl.int64) * rows_in_all * heads
        tl.store(out + part * D + there, narrow(mixed, out.dtype.element_ty), mask=real[:, None] & wide[None, :])
        if SPLITS > 1:
            tl.store(peaks + part + places, highest, mask=real)
            tl.store(sums + part + places, total, mask=real)


@triton.jit
def _merge_kernel(
    parts, peaks, sums, out, scales, tokens, heads, D, kind,
    SPLITS: tl.constexpr, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = lanes < heads * D
    place = row * heads + lanes // D
    highest = tl.full((WIDTH,), float("-inf"), tl.float32)
    for part in tl.static_range(SPLITS):
        peak = tl.load(peaks + part * tokens * heads + place, mask=inside, other=0.0)
        highest = tl.maximum(highest, peak)
    total, mixed = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for part in tl.static_range(SPLITS):
        spot = part * tokens * heads + place
        share = tl.exp2(tl.load(peaks + spot, mask=inside, other=0.0) - highest)
        share *= tl.load(sums + spot, mask=inside, other=1.0)
        total += share
        mixed += tl.load(parts + spot * D + lanes % D, mask=inside, other=0.0).to(tl.float32) * share
    put(out, scales, row, lanes, narrow(mixed / total, kind.dtype.element_ty), heads * D, FORM, SPAN)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    pool_keys: Tensor,
    pool_values: Tensor,
    plan: Plan,
    following: Operand,
) -> Ready:
    """All segments' attention in one or two launches: [T, heads, D] -> [T, heads * D] as the next weight wants it; the
    scale is 1.

    Args:
        queries: [T, heads, D], normalised and turned.
        keys, values: [T, kv_heads, D], of the canvases; rows of encoded segments are not read.
        pool_keys, pool_values: [pages, kv_heads, P, D], where encoded segments' own are already written.
    """
    rows, heads, width = queries.shape
    _, kv_heads, page, _ = pool_keys.shape
    tile, splits = tiles.attention(width, queries.dtype == torch.float32), plan.splits
    parts = torch.empty_like(queries)
    peaks, sums = parts, parts
    if splits > 1:
        parts = queries.new_empty(splits, rows, heads, width)
        peaks, sums = torch.empty(2, splits, rows, heads, device=queries.device)
    lanes, wide = power(heads // kv_heads), max(16, power(width))
    _attend_kernel[(len(plan.blocks), kv_heads, splits)](
        queries, keys, values, pool_keys, pool_values, plan.segments, plan.blocks, plan.pages, parts, peaks, sums,
        plan.window or 1 << 30, plan.pages.shape[1], heads, kv_heads, rows, width,
        GROUP=heads // kv_heads, LANES=lanes, BQ=plan.block, BK=tile.columns, BD=wide, PAGE=page, SPLITS=splits,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits == 1:
        return ready(parts.flatten(1), following)
    out = room(rows, queries, following)
    if rows:
        _merge_kernel[(rows,)](
            parts, peaks, sums, *out, rows, heads, width, queries, SPLITS=splits, FORM=following.form,
            SPAN=following.span, WIDTH=power(heads * width), num_warps=8,
        )  # fmt: skip
    return out
