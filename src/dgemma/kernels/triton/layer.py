"""Everything of a layer that is neither a product nor attention, in four launches: norms, residuals, rotary, gate.

All is computed in float32 and rounded where it is written; the network itself rounds after each norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import gelu, narrow, power


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
    queries, keys, values, query_weight, key_weight, cos, sin, slots, pool_keys, pool_values, out_queries, out_keys,
    out_values, heads, kv_heads, D, eps,
    PAGE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    rows = tl.arange(0, KV_HEADS)[:, None]
    page = (slot // PAGE * kv_heads * PAGE + slot % PAGE) * D  # of the first head; the next is PAGE * D further
    if part == 0:
        low, high, there, inside = _turned(
            queries + token * heads * D, query_weight, cos + token * D, sin + token * D, heads, D, eps, HEADS, HALF
        )
        target = out_queries + token * heads * D + there
        tl.store(target, narrow(low, out_queries.dtype.element_ty), mask=inside)
        tl.store(target + D // 2, narrow(high, out_queries.dtype.element_ty), mask=inside)
    elif part == 1:
        key_low, key_high, key_there, key_inside = _turned(
            keys + token * kv_heads * D, key_weight, cos + token * D, sin + token * D, kv_heads, D, eps, KV_HEADS, HALF
        )
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
        value = tl.load(values + value_there, mask=value_inside, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        value = narrow(value, out_values.dtype.element_ty)
        tl.store(out_values + value_there, value, mask=value_inside)
        tl.store(pool_values + page + rows * PAGE * D + lanes, value, mask=value_inside & (slot + rows * 0 >= 0))


@triton.jit
def _enter_kernel(
    x, residual, weight, one, two, three, h, out_one, out_two, out_three, H, eps, factor,
    ADD: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * H
    lanes = tl.arange(0, WIDTH)
    inside = lanes < H
    value = tl.load(x + row + lanes, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = value * _scale(value, H, eps) * tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(residual + row + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row + lanes, narrow(value, h.dtype.element_ty), mask=inside)
    value = value * _scale(value, H, eps)
    own = value
    if COUNT:
        own = value * tl.load(one + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_one + row + lanes, narrow(own, out_one.dtype.element_ty), mask=inside)
    if COUNT == 3:
        own = value * tl.load(two + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_two + row + lanes, narrow(own, out_two.dtype.element_ty), mask=inside)
        own = value * tl.load(three + lanes, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(out_three + row + lanes, narrow(own, out_three.dtype.element_ty), mask=inside)


@triton.jit
def _leave_kernel(
    h, dense, room, weights, dense_weight, mixed_weight, weight, scalars, next_weight, out, normed, k, H, eps,
    NEXT: tl.constexpr, WIDTH: tl.constexpr,
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
    if NEXT:
        own = value * _scale(value, H, eps) * tl.load(next_weight + lanes, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + token * H + lanes, narrow(own, normed.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(gates, up, out, count, BLOCK: tl.constexpr):
    spots = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = spots < count
    value = gelu(tl.load(gates + spots, mask=inside, other=0.0).to(tl.float32))
    value *= tl.load(up + spots, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + spots, narrow(value, out.dtype.element_ty), mask=inside)


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """`gelu(gates) * up`, GELU in its tanh form, rounded once: two contiguous tensors of one shape -> the same."""
    out, count = torch.empty_like(gates), gates.numel()
    if count:
        _gate_kernel[(triton.cdiv(count, 1024),)](gates, up, out, count, BLOCK=1024, num_warps=4)
    return out


def heads(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
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
        queries: [T, heads, D]; keys, values: [T, kv_heads, D] (in full layers the same tensor).
        query_weight, key_weight: [D].
        turn: cosines and sines [T, D], as `model.rope.rotation` makes them.
        slots: int64 [T], `page * P + place` where a token's key and value go; -1: nowhere.
        pool: keys and values [pages, kv_heads, P, D].
    """
    tokens, count, width = queries.shape
    kv_heads, page = pool[0].shape[1:3]
    out = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    if tokens:
        _heads_kernel[(tokens, 3)](
            queries, keys, values, query_weight, key_weight, *turn, slots, *pool, *out, count, kv_heads, width, eps,
            PAGE=page, HALF=power(width // 2), HEADS=power(count), KV_HEADS=power(kv_heads),
            num_warps=8 if count * width >= 4096 else 4,
        )  # fmt: skip
    return out


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of rows [T, H], with a weight [H] or without."""
    out = torch.empty_like(x)
    if len(x):
        own = x if weight is None else weight
        _enter_kernel[(len(x),)](
            x, x, own, own, own, own, x, out, out, out, x.shape[1], eps, 1.0,
            ADD=False, COUNT=0 if weight is None else 1, WIDTH=power(x.shape[1]), num_warps=8,
        )  # fmt: skip
    return out


def enter(x: Tensor, residual: Tensor, weight: Tensor, others: Sequence[Tensor], eps: float) -> tuple[Tensor, ...]:
    """Between attention and feed-forward: `h = residual + norm(x) * weight`, and h normalised for the dense MLP, for
    the experts and for the router.

    Args:
        x, residual: [T, H].
        others: weights [H] of the norms before MLP and experts, and the router's scale (H^-0.5 is applied here).

    Returns:
        h and the three, [T, H] each.
    """
    out = tuple(torch.empty_like(x) for _ in range(4))
    if len(x):
        _enter_kernel[(len(x),)](
            x, residual, weight, *others, *out, x.shape[1], eps, x.shape[1] ** -0.5,
            ADD=True, COUNT=3, WIDTH=power(x.shape[1]), num_warps=8,
        )  # fmt: skip
    return out


def leave(
    h: Tensor,
    dense: Tensor,
    room: Tensor,
    weights: Tensor,
    norms: Sequence[Tensor],
    scalars: Tensor,
    next_norm: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """A layer's end: the experts' weighted sum, three norms, the residual, the layer's scalar, the next layer's norm.

    Args:
        h, dense: [T, H].
        room, weights: [T, k, H] and [T, k] float32, the experts' outputs.
        norms: weights [H] of the norms behind the dense MLP, behind the experts and behind their sum.
        scalars: [T], each token's.
        next_norm: [H], the norm that the next layer begins with.

    Returns:
        The layer's output and, with `next_norm`, what that norm makes of it.
    """
    tokens, k, width = room.shape
    out = torch.empty_like(h)
    normed = torch.empty_like(h) if next_norm is not None else None
    if tokens:
        _leave_kernel[(tokens,)](
            h, dense, room, weights, *norms, scalars, h if next_norm is None else next_norm, out,
            out if normed is None else normed, k, width, eps,
            NEXT=next_norm is not None, WIDTH=power(width), num_warps=8,
        )  # fmt: skip
    return out, normed
