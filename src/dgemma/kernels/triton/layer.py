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
    heads, kv_heads, D, pitch, eps,
    PAGE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    rows = tl.arange(0, KV_HEADS)[:, None]
    page = (slot // PAGE * kv_heads * PAGE + slot % PAGE) * D  # of the first head; the next is PAGE * D further
    if part == 0:
        low, high, there, inside = _turned(
            projected + token * pitch, query_weight, cos + token * D, sin + token * D, heads, D, eps, HEADS, HALF
        )
        target = out_queries + token * heads * D + there
        tl.store(target, narrow(low, out_queries.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, narrow(high, out_queries.dtype.element_ty), mask=inside)
    elif part == 1:
        key_low, key_high, key_there, key_inside = _turned(
            projected + token * pitch + heads * D, key_weight, cos + token * D, sin + token * D, kv_heads, D, eps,
            KV_HEADS, HALF,
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
    h, dense, room, weights, dense_weight, mixed_weight, weight, scalars, next_weight, out, normed, scales, k, H, eps,
    FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
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
    value *= tl.load(scalars + token).to(tl.float32)
    tl.store(out + token * H + lanes, narrow(value, out.dtype.element_ty), mask=inside)
    own = value * _scale(value, H, eps) * tl.load(next_weight + lanes, mask=inside, other=0.0).to(tl.float32)
    put(normed, scales, token, lanes, narrow(own, out.dtype.element_ty), H, FORM, SPAN)


@triton.jit
def _gate_kernel(both, out, scales, N, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    there, inside = both + row * 2 * N + lanes, lanes < N
    value = gelu(tl.load(there, mask=inside, other=0.0).to(tl.float32))
    value *= tl.load(there + N, mask=inside, other=0.0).to(tl.float32)
    put(out, scales, row, lanes, narrow(value, both.dtype.element_ty), N, FORM, SPAN)


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
        turn: cosines and sines [T, D], as `model.rope.rotation` makes them.
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
            projected, query_weight, key_weight, *turn, slots, *pool, *out, count, kv_heads, width, pitch, eps,
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
    scalars: Tensor,
    next_norm: Tensor,
    eps: float,
    following: Operand,
) -> tuple[Tensor, Ready]:
    """A layer's end: the experts' weighted sum, three norms, the residual, the layer's scalar, the next layer's norm.

    Args:
        h, dense: [T, H].
        parts, weights: [T, k, H] and [T, k] float32, the experts' outputs.
        norms: weights [H] of the norms behind the dense MLP, behind the experts and behind their sum.
        scalars: [T], each token's.
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
            h, dense, parts, weights, *norms, scalars, next_norm, out, *normed, k, width, eps,
            FORM=following.form, SPAN=following.span, WIDTH=power(width), num_warps=8,
        )  # fmt: skip
    return out, normed
