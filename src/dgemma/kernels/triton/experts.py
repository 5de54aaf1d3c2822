"""A mixture of experts in three launches: gate and up with the gated GELU, down, and the weighted sum.

Assignments (a token and one of its experts, numbered `token * k + choice`) come sorted by expert. A program takes some
of one expert's assignments and some of its outputs; which ones it finds out itself, so that no size is known to the
host. What the down product gives lies at its assignment's place, [T, k, H]; the last launch sums over k in the router's
order, so that a result never depends on who was first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized
from . import tiles as sizes
from .common import fp8_scale, gelu, narrow, operand, power, products, row_words, spread
from .linear import Ready, ready, room
from .tiles import Tile


@triton.jit
def _find(offsets, block, count, PADDED: tl.constexpr, BM: tl.constexpr):
    """The expert of a block of assignments, and the block's first and its expert's last place; expert >= count behind
    the last block."""
    experts = tl.arange(0, PADDED)
    start = tl.load(offsets + experts, mask=experts < count, other=0)
    end = tl.load(offsets + experts + 1, mask=experts < count, other=0)
    blocks = tl.cdiv(end - start, BM)
    ends = tl.cumsum(blocks, 0)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    mine = experts == expert
    first = tl.sum(tl.where(mine, start + (block - ends + blocks) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _gate_up_kernel(
    x, xs, w, ws, wf, order, offsets, out, out_scales, count, k, N, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, SPREAD: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BN)
    tile = tl.program_id(0) % tiles
    expert, first, last = _find(offsets, tl.program_id(0) // tiles, count, PADDED, BM)
    if expert < count:
        places = first + tl.arange(0, BM)
        seen = places < last
        rows = tl.load(order + places, mask=seen, other=0) // k
        # Gate and up rows take turns, so that one product has both and each thread finds the pairs it needs.
        lanes = tl.arange(0, 2 * BN)
        columns = tile * BN + lanes // 2
        lines = columns + lanes % 2 * N
        groups = K // GROUP if GROUP else 1
        pitch, mine = row_words(K, FORM, GROUP), expert.to(tl.int64) * 2 * N
        acc = products(
            x, xs, rows, seen, w + mine * pitch, ws + mine * groups, wf + mine, lines, columns < N, K,
            FORM, GROUP, 0, BM, 2 * BN, BK,
        )  # fmt: skip
        gate, up = tl.split(tl.permute(tl.reshape(acc, (BN, 2, BM)), (0, 2, 1)))
        value = gelu(gate) * up
        lines = tile * BN + tl.arange(0, BN)
        if FORM == "fp8":
            scale = fp8_scale(tl.max(tl.abs(tl.where((lines < N)[:, None], value, 0.0)), 0))
            value = value / scale[None, :]
            tl.store(out_scales + places.to(tl.int64) * tiles + tile, scale, mask=seen)
        spots, row = lines, N
        if SPREAD:
            spots, row = spread(lines, SPREAD), tl.cdiv(N, SPREAD) * SPREAD
        there = out + places.to(tl.int64)[None, :] * row + spots[:, None]
        tl.store(there, narrow(value, out.dtype.element_ty), mask=(lines < N)[:, None] & seen[None, :])


@triton.jit
def _down_kernel(
    x, xs, w, ws, wf, order, offsets, out, count, N, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BN)
    expert, first, last = _find(offsets, tl.program_id(0) // tiles, count, PADDED, BM)
    if expert < count:
        places = first + tl.arange(0, BM)
        seen = places < last
        assigned = tl.load(order + places, mask=seen, other=0).to(tl.int64)
        lines = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
        groups = K // GROUP if GROUP else 1
        pitch, mine = row_words(K, FORM, GROUP), expert.to(tl.int64) * N
        acc = products(
            x, xs, places, seen, w + mine * pitch, ws + mine * groups, wf + mine, lines, lines < N, K,
            FORM, GROUP, SPAN, BM, BN, BK,
        )  # fmt: skip
        there = out + assigned[None, :] * N + lines[:, None]
        tl.store(there, narrow(acc, out.dtype.element_ty), mask=(lines < N)[:, None] & seen[None, :])


@triton.jit
def _sum_kernel(room, weights, out, k, N, BN: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lines = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for choice in range(k):
        weight = tl.load(weights + token * k + choice)
        there = lines < tl.where(weight != 0.0, N, 0)
        total += weight * tl.load(room + (token * k + choice) * N + lines, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * N + lines, narrow(total, out.dtype.element_ty), mask=lines < N)


def blocks(tokens: int, k: int, count: int, rows: int) -> int:
    """The most blocks of `rows` that the assignments can take: every expert's last may be nearly empty."""
    return min(tokens * k, (tokens * k + (rows - 1) * count) // rows)


def expert_outputs(
    x: Tensor | Ready,
    order: Tensor,
    offsets: Tensor,
    gate_up: Tensor | Quantized,
    down: Tensor | Quantized,
    *,
    tiles: tuple[Tile, Tile] | None = None,
    dtype: torch.dtype | None = None,
    of: int | None = None,
) -> Tensor:
    """What each expert makes of each token that chose it: [T, k, H] in x's dtype, not yet weighted.

    Where these are some of all experts, places of assignments to others are left as they are.

    Args:
        x: [T, H], or what is `ready` of it for `gate_up`; then `dtype` says in which dtype the outputs are.
        order: [T * k] int32, assignments sorted by expert.
        offsets: [E + 1] int32, where in `order` each of these experts' begin.
        gate_up, down: [E, 2I, H] and [E, H, I], both in FP8 or neither; weights that `common.fits`.
        tiles: for the two products.
        of: how many experts tokens choose from; None: these are all.
    """
    first, second = operand(gate_up), operand(down)
    own = ready(x, first) if isinstance(x, Tensor) else x
    kind = x.dtype if isinstance(x, Tensor) else dtype
    assert kind is not None
    count, doubled, hidden = first.shape
    width, tokens = doubled // 2, len(own.values)
    k, device = len(order) // max(1, tokens), own.values.device
    assert (first.form == "fp8") == (second.form == "fp8") and second.shape == (count, hidden, width)
    out = torch.empty(tokens, k, hidden, dtype=kind, device=device)
    if not out.numel():
        return out
    one, two = tiles or sizes.experts(tokens * k // (of or count), first, second, kind.itemsize)
    padded, parts = power(count), triton.cdiv(width, one.columns)
    between = room(tokens * k, out, second)
    scales = torch.empty(tokens * k, parts, device=device) if first.form == "fp8" else between.values
    _gate_up_kernel[(blocks(tokens, k, count, one.rows) * parts,)](
        *own, first.data, first.scales, first.factors, order, offsets, between.values, scales, count, k, width, hidden,
        FORM=first.form, GROUP=first.group, SPREAD=second.span, PADDED=padded,
        BM=one.rows, BN=one.columns, BK=one.inner, num_warps=one.warps, num_stages=one.stages,
    )  # fmt: skip
    _down_kernel[(blocks(tokens, k, count, two.rows) * triton.cdiv(hidden, two.columns),)](
        between.values, scales, second.data, second.scales, second.factors, order, offsets, out, count, hidden, width,
        FORM=second.form, GROUP=second.group, SPAN=one.columns if first.form == "fp8" else 0, PADDED=padded,
        BM=two.rows, BN=two.columns, BK=two.inner, num_warps=two.warps, num_stages=two.stages,
    )  # fmt: skip
    return out


def weighted_sum(room: Tensor, weights: Tensor) -> Tensor:
    """[T, k, H] and [T, k] float32 -> [T, H]: the sum over k in order, in float32, rounded once. What has the weight 0
    is not read.
    """
    tokens, k, hidden = room.shape
    out = torch.empty(tokens, hidden, dtype=room.dtype, device=room.device)
    if tokens:
        _sum_kernel[(tokens, triton.cdiv(hidden, 1024))](room, weights.contiguous(), out, k, hidden, BN=1024)
    return out
