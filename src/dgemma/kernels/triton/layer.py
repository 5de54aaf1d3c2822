"""Everything of a layer that is neither a product nor attention: norms, residuals, rotary, gate.

All is computed in float32 and rounded where it is written; the network itself rounds after each norm. What goes into a
product is written as that wants it (`common.put`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Operand, gelu, narrow, power, put
from .linear import Ready, room


@triton.jit
def _scale(x, H, eps):
    """What an RMSNorm multiplies a row with; what is beyond its H numbers is 0."""
    return tl.rsqrt(tl.sum(x * x, 0) / H + eps)


@triton.jit
def _turned(source, weight, cos, sin, heads, D, eps, PADDED: tl.constexpr, HALF: tl.constexpr):
    """A token's queries or keys, normalised and turned in pairs (i, i + D / 2): both halves [PADDED, HALF], their
    places and which of them exist."""
    lanes, half = tl.arange(0, HALF)[None, :], D // 2
    rows = tl.arange(0, PADDED)[:, None]
    inside = (rows < heads) & (lanes < half)
    there = rows * D + lanes
    first = tl.load(source + there, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + there, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
    first = first * scale * tl.load(weight + lanes, mask=lanes < half, other=0.0).to(tl.float32)
    second = second * scale * tl.load(weight + half + lanes, mask=lanes < half, other=0.0).to(tl.float32)
    c = tl.load(cos + lanes, mask=lanes < half, other=0.0).to(tl.float32)
    s = tl.load(sin + lanes, mask=lanes < half, other=0.0).to(tl.float32)
    return first * c - second * s, second * c + first * s, there, inside


@triton.jit
def _heads_kernel(
    projected, query_weight, key_weight, cos, sin, slots, pool_keys, pool_values, out_queries, out_keys, out_values,
    heads, kv_heads, D, pitch, turn_pitch, eps,
    PAGE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    rows = tl.arange(0, KV_HEADS)[:, None]
    page = (slot // PAGE * kv_heads * PAGE + slot % PAGE) * D  # of the first head; the next is PAGE * D further
    if part == 0:
        low, high, there, inside = _turned(
            projected + token * pitch, query_weight, cos + token * turn_pitch, sin + token * turn_pitch, heads, D, eps,
            HEADS, HALF,
        )  # fmt: skip
        target = out_queries + token * heads * D + there
        tl.store(target, narrow(low, out_queries.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, narrow(high, out_queries.dtype.element_ty), mask=inside)
    elif part == 1:
        key_low, key_high, key_there, key_inside = _turned(
            projected + token * pitch + heads * D, key_weight, cos + token * turn_pitch, sin + token * turn_pitch,
            kv_heads, D, eps, KV_HEADS, HALF,
        )  # fmt: skip
        key_low, key_high = narrow(key_low, out_keys.dtype.element_ty), narrow(key_high, out_keys.dtype.element_ty)
        key_target = out_keys + token * kv_heads * D + key_there
        tl.store(key_target, key_low, mask=key_inside)
        tl.store(key_target + D // 2, key_high, mask=key_inside)
        key_target = pool_keys + page + rows * PAGE * D + tl.arange(0, HALF)[None, :]
        tl.store(key_target, key_low, mask=key_inside & (slot + rows * 0 >= 0))
        tl.store(key_target + D // 2, key_high, mask=key_inside & (slot + rows * 0 >= 0))
    else:
        lanes = tl.arange(0, 2 * HALF)[None, :]
        value_inside, value_there = (rows < kv_heads) & (lanes < D), token * kv_heads * D + rows * D + lanes
        own = projected + (token + 1) * pitch - kv_heads * D + rows * D + lanes  # the last ones: of keys or their own
        value = tl.load(own, mask=value_inside, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        value = narrow(value, out_values.dtype.element_ty)
        tl.store(out_values + value_there, value, mask=value_inside)
        tl.store(pool_values + page + rows * PAGE * D + lanes, value, mask=value_inside & (slot + rows * 0 >= 0))


@triton.jit
def _norm_kernel(
    x, weight, out, scales, H, eps, SCALED: tl.constexpr, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr
):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = lanes < H
    value = tl.load(x + row * H + lanes, mask=inside, other=0.0).to(tl.float32)
    value = value * _scale(value, H, eps)
    if SCALED:
        value *= tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    put(out, scales, row, lanes, narrow(value, x.dtype.element_ty), H, FORM, SPAN)


@triton.jit
def _enter_kernel(
    x, residual, weight, one, two, three, h, out_one, scales_one, out_two, scales_two, out_three, H, eps, factor,
    FORM_ONE: tl.constexpr, SPAN_ONE: tl.constexpr, FORM_TWO: tl.constexpr, SPAN_TWO: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, there = lanes < H, row * H + lanes
    value = tl.load(x + there, mask=inside, other=0.0).to(tl.float32)
    value = value * _scale(value, H, eps) * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(residual + there, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + there, narrow(value, x.dtype.element_ty), mask=inside)
    value = value * _scale(value, H, eps)
    own = value * tl.load(one + lanes, mask=inside, other=0.0).to(tl.float32)
    put(out_one, scales_one, row, lanes, narrow(own, x.dtype.element_ty), H, FORM_ONE, SPAN_ONE)
    own = value * tl.load(two + lanes, mask=inside, other=0.0).to(tl.float32)
    put(out_two, scales_two, row, lanes, narrow(own, x.dtype.element_ty), H, FORM_TWO, SPAN_TWO)
    own = value * tl.load(three + lanes, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(out_three + there, narrow(own, x.dtype.element_ty), mask=inside)


@triton.jit
def _leave_kernel(
    h, dense, room, weights, dense_weight, mixed_weight, weight, scalars, next_weight, out, normed, scales, encoded, k,
    H, eps, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    inside = lanes < H
    mixed = tl.zeros((WIDTH,), tl.float32)
    for choice in range(k):
        value = tl.load(room + (token * k + choice) * H + lanes, mask=inside, other=0.0).to(tl.float32)
        mixed += value * tl.load(weights + token * k + choice)
    mixed = mixed * _scale(mixed, H, eps) * tl.load(mixed_weight + lanes, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(dense + token * H + lanes, mask=inside, other=0.0).to(tl.float32)
    value = value * _scale(value, H, eps) * tl.load(dense_weight + lanes, mask=inside, other=0.0).to(tl.float32)
    value += mixed
    value = value * _scale(value, H, eps) * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(h + token * H + lanes, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scalars + (token >= encoded).to(tl.int32)).to(tl.float32)
    tl.store(out + token * H + lanes, narrow(value, out.dtype.element_ty), mask=inside)
    own = value * _scale(value, H, eps) * tl.load(next_weight + lanes, mask=inside, other=0.0).to(tl.float32)
    put(normed, scales, token, lanes, narrow(own, out.dtype.element_ty), H, FORM, SPAN)


@triton.jit
def _embed_kernel(
    table, table_scales, tokens, spots, canvases, soft, weight, x, normed, scales, encoded, before, V, H, factor,
    eps, TABLE: tl.constexpr, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = lanes < H
    if row < encoded:
        token = tl.load(tokens + row)
    else:
        spot = tl.load(spots + row - encoded)
        token = tl.load(canvases + spot)
        value = tl.load(soft + spot * H + lanes, mask=inside, other=0.0).to(tl.float32)
        value = value * _scale(value, H, eps) * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        put(normed, scales, row - encoded, lanes, narrow(value, soft.dtype.element_ty), H, FORM, SPAN)
    token -= before
    held = tl.where((token >= 0) & (token < V), H, 0)  # no number of a word that is another rank's
    token = tl.where(held > 0, token, 0)
    entry = tl.load(table + token * H + lanes, mask=lanes < held, other=0.0).to(tl.float32) * factor
    if TABLE != "float":
        entry *= tl.load(table_scales + token)
    tl.store(x + row * H + lanes, narrow(entry, x.dtype.element_ty), mask=inside)


@triton.jit
def _condition_kernel(x, more, H, eps, WIDTH: tl.constexpr):
    there, inside = tl.program_id(0).to(tl.int64) * H + tl.arange(0, WIDTH), tl.arange(0, WIDTH) < H
    value = tl.load(x + there, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(more + there, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + there, narrow(value * _scale(value, H, eps), x.dtype.element_ty), mask=inside)


@triton.jit
def _turns_kernel(positions, frequencies, cos, sin, pairs, WIDTH: tl.constexpr):
    token, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = lanes < pairs
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + lanes, mask=inside, other=0.0)
    tl.store(cos + token * pairs + lanes, narrow(tl.cos(angle), cos.dtype.element_ty), mask=inside)
    tl.store(sin + token * pairs + lanes, narrow(tl.sin(angle), sin.dtype.element_ty), mask=inside)


@triton.jit
def _sound_kernel(x, flags, H, WIDTH: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    size = tl.abs(tl.load(x + row * H + lanes, mask=lanes < H, other=0.0).to(tl.float32))
    tl.store(flags + row, tl.min((size < float("inf")).to(tl.int32), 0).to(tl.uint8))


@triton.jit
def _gate_kernel(both, out, scales, N, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there, inside = both + row * 2 * N + lanes, lanes < N
    value = gelu(tl.load(there, mask=inside, other=0.0).to(tl.float32))
    value *= tl.load(there + N, mask=inside, other=0.0).to(tl.float32)
    put(out, scales, row, lanes, narrow(value, both.dtype.element_ty), N, FORM, SPAN)


def embed(
    table: Operand,
    factor: float,
    tokens: Tensor,
    spots: Tensor,
    canvases: Tensor,
    soft: Tensor,
    weight: Tensor,
    eps: float,
    following: Operand,
    before: int = 0,
) -> tuple[Tensor, Ready]:
    """Rows of a table [V, H] times a factor, and the norm of canvases' soft embeddings.

    Args:
        table: floats, FP8 or 8 bits with a scale a row.
        tokens: int64 [E], the first rows'.
        spots: int64 [D], where the other rows' tokens and soft embeddings are.
        canvases, soft: int64 [P, L], and [P, L, H] in the network's dtype.
        weight: [H], the norm's.
        following: the weight that the normed ones meet.
        before: words before the table's first, where it is part of a larger one; rows of others' words are zeros.

    Returns:
        [E + D, H], and [D, H] as that weight wants it.
    """
    rows, width = len(tokens) + len(spots), soft.shape[-1]
    x, normed = torch.empty(rows, width, dtype=soft.dtype, device=soft.device), room(len(spots), soft, following)
    if rows:
        _embed_kernel[(rows,)](
            table.data, table.scales, tokens, spots, canvases, soft, weight, x, *normed, len(tokens), before,
            table.shape[0], width, factor, eps,
            TABLE=table.form, FORM=following.form, SPAN=following.span, WIDTH=power(width), num_warps=8,
        )  # fmt: skip
    return x, normed


def condition(x: Tensor, more: Tensor, eps: float) -> None:
    """Makes of rows x [T, H] the RMSNorm, without a weight, of x + more."""
    _condition_kernel[(len(x),)](x, more, x.shape[1], eps, WIDTH=power(x.shape[1]), num_warps=8)


def turns(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, F] in a dtype, of positions int64 [T] and of angles a position, float32 [F]
    (`model.rope.inverse_frequencies`, of one kind of layer behind another).
    """
    cos, sin = torch.empty(2, len(positions), len(frequencies), dtype=dtype, device=positions.device)
    if len(positions):
        pairs = len(frequencies)
        _turns_kernel[(len(positions),)](positions, frequencies, cos, sin, pairs, WIDTH=power(pairs), num_warps=4)
    return cos, sin


def sound(x: Tensor, flags: Tensor) -> None:
    """Writes to `flags`, uint8 [T], 1 for rows of x [T, H] that are all numbers, else 0."""
    if len(x):
        _sound_kernel[(len(x),)](x, flags, x.shape[1], WIDTH=power(x.shape[1]), num_warps=8)


def gate(both: Tensor, following: Operand) -> Ready:
    """`gelu(gates) * up`, GELU in its tanh form, rounded once: [T, 2N], gates first, as the next weight wants it."""
    rows, width = len(both), both.shape[1] // 2
    out = room(rows, both, following)
    if rows:
        _gate_kernel[(rows,)](
            both, *out, width, FORM=following.form, SPAN=following.span, WIDTH=power(width), num_warps=4
        )
    return out


def heads(
    projected: Tensor,
    count: int,
    query_weight: Tensor,
    key_weight: Tensor,
    turn: tuple[Tensor, Tensor],
    eps: float,
    *,
    slots: Tensor,
    pool: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Head norms, rotary and the cache's new entries: raw projections to what attention wants.

    Args:
        projected: [T, (heads + kv_heads) * D], queries and keys, which are the values too; or with values behind them.
        count: heads of queries.
        query_weight, key_weight: [D].
        turn: cosines and sines of pairs (i, i + D / 2), as `turns` makes them: [T, D / 2], maybe parts of wider rows.
        slots: int64 [T], `page * P + place` where a token's key and value go; -1: nowhere.
        pool: keys and values [pages, kv_heads, P, D].

    Returns:
        Queries [T, heads, D], keys and values [T, kv_heads, D].
    """
    tokens, pitch = projected.shape
    kv_heads, page, width = pool[0].shape[1:]
    own = projected.new_empty
    out = own(tokens, count, width), own(tokens, kv_heads, width), own(tokens, kv_heads, width)
    if tokens:
        _heads_kernel[(tokens, 3)](
            projected, query_weight, key_weight, *turn, slots, *pool, *out, count, kv_heads, width, pitch,
            turn[0].stride(0), eps,
            PAGE=page, HALF=power(width // 2), HEADS=power(count), KV_HEADS=power(kv_heads),
            num_warps=8 if count * width >= 4096 else 4,
        )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor | None, eps: float, following: Operand) -> Ready:
    """RMSNorm of rows [T, H], with a weight [H] or without, as the next weight wants it."""
    out = room(len(x), x, following)
    if len(x):
        _norm_kernel[(len(x),)](
            x, x if weight is None else weight, *out, x.shape[1], eps, SCALED=weight is not None,
            FORM=following.form, SPAN=following.span, WIDTH=power(x.shape[1]), num_warps=8,
        )  # fmt: skip
    return out


def enter(
    x: Tensor, residual: Tensor, weight: Tensor, others: Sequence[Tensor], eps: float, following: Sequence[Operand]
) -> tuple[Tensor, Ready, Ready, Tensor]:
    """Between attention and feed-forward: `h = residual + norm(x) * weight`, and h normalised for the dense MLP, for
    the experts and for the router.

    Args:
        x, residual: [T, H].
        others: weights [H] of the norms before MLP and experts, and the router's scale (H^-0.5 is applied here).
        following: the first weights of MLP and experts.

    Returns:
        h [T, H], what MLP and experts want, and [T, H] for the router.
    """
    h, routed = torch.empty_like(x), torch.empty_like(x)
    dense, mixed = (room(len(x), x, own) for own in following)
    if len(x):
        first, second = following
        _enter_kernel[(len(x),)](
            x, residual, weight, *others, h, *dense, *mixed, routed, x.shape[1], eps, x.shape[1] ** -0.5,
            FORM_ONE=first.form, SPAN_ONE=first.span, FORM_TWO=second.form, SPAN_TWO=second.span,
            WIDTH=power(x.shape[1]), num_warps=8,
        )  # fmt: skip
    return h, dense, mixed, routed


def leave(
    h: Tensor,
    dense: Tensor,
    parts: Tensor,
    weights: Tensor,
    norms: Sequence[Tensor],
    scalars: tuple[Tensor, int],
    next_norm: Tensor,
    eps: float,
    following: Operand,
) -> tuple[Tensor, Ready]:
    """A layer's end: the experts' weighted sum, three norms, the residual, the layer's scalar, the next layer's norm.

    Args:
        h, dense: [T, H].
        parts, weights: [T, k, H] and [T, k] float32, the experts' outputs.
        norms: weights [H] of the norms behind the dense MLP, behind the experts and behind their sum.
        scalars: [2], the one of the first so many tokens, which are encoded, and that of the others.
        next_norm: [H], the norm that the next layer begins with.
        following: the next layer's first weight.

    Returns:
        The layer's output, and what that norm makes of it, as the next weight wants it.
    """
    tokens, k, width = parts.shape
    out = torch.empty_like(h)
    normed = room(tokens, h, following)
    if tokens:
        _leave_kernel[(tokens,)](
            h, dense, parts, weights, *norms, scalars[0], next_norm, out, *normed, scalars[1], k, width, eps,
            FORM=following.form, SPAN=following.span, WIDTH=power(width), num_warps=8,
        )  # fmt: skip
    return out, normed
