"""The operations of quantised networks on a CPU. Each takes packed weights (compiled kernels) or plain ones (twins).

A row's result depends on that row alone, bit for bit: not on the other rows, the number of threads or the instruction
set.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import Quantized
from . import native, reference
from .belief import Belief
from .packed import Packed, pack, unpack
from .wish import Wish, beliefs_of

__all__ = [
    "Look", "Packed", "Weight", "Wish", "available", "experts", "gate", "isa", "linear", "norm", "pack", "read",
    "unpack", "vocabulary",
]  # fmt: skip

Weight = Packed | Quantized
AT_ONCE = 64  # positions whose scores are held at once where the table is none of the fused step's
SLAB = 4096  # words of such a table that are blended at once
BLOCK = 64  # words of the fused step whose weights share a scale
# Weights that a blend may leave out, as a share of all: half a unit in the last place of its result's dtype.
TOLERANCE = {torch.float32: 2.0**-25, torch.bfloat16: 2.0**-9}


class Look(NamedTuple):
    """What the vocabulary step finds of n positions.

    Fields:
        found: words and entropies.
        soft: the table's rows blended by their probabilities, float32 [n, H]; None unless asked for.
        share: of all pairs of a position and a stretch of words, those that took part in `soft`.
    """

    found: Belief
    soft: Tensor | None
    share: float


def available() -> bool:
    """Whether the compiled kernels are there (and not refused by `DGEMMA_CPU_ISA=reference`)."""
    return native.library() is not None


def isa() -> str:
    """The instruction set in use: "avx512vnni", "avxvnni", "avx2", "neon", "portable"; "reference": plain torch."""
    return native.isa()


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T` with activations rounded to 8 bits row by row: [..., I] and [O, I] -> [..., O] in x's dtype.

    x is float32 or bfloat16. Equals its twin bit for bit.
    """
    flat = _rows(x, weight)
    if isinstance(weight, Quantized):
        out = reference.linear(flat, weight)
    else:
        out = torch.empty(len(flat), weight.shape[-2], dtype=x.dtype)
        _library().dgemma_linear(*_input(flat), ctypes.byref(weight.c), native.address(out), native.threads())
    return out.view(*x.shape[:-1], weight.shape[-2])


def experts(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    """Sum over each token's k experts of weight times `down(gelu(gate(x)) * up(x))`. Equals its twin bit for bit.

    Args:
        x: [T, H] float32 or bfloat16.
        weights: [T, k] float32.
        experts: [T, k] int64, below E.
        gate_up: [E, 2I, H], gate rows first.
        down: [E, H, I].

    Returns:
        [T, H] in x's dtype.
    """
    x = _rows(x, gate_up)
    if isinstance(gate_up, Quantized) or isinstance(down, Quantized):
        return reference.experts(x, weights, experts, _plain(gate_up), _plain(down))
    assert len(gate_up.shape) == 3 and gate_up.shape[0] == down.shape[0]
    assert gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]
    tokens, k = experts.shape
    weights, experts = weights.float().contiguous(), experts.contiguous()
    assert experts.dtype == torch.int64 and weights.shape == experts.shape
    assert not tokens or 0 <= int(experts.min()) <= int(experts.max()) < gate_up.shape[0]
    room, out = torch.empty(tokens * k, x.shape[1]), torch.empty_like(x)
    _library().dgemma_experts(
        *_input(x),
        k,
        native.address(weights),
        native.address(experts),
        ctypes.byref(gate_up.c),
        ctypes.byref(down.c),
        native.address(room),
        native.address(out),
        native.threads(),
    )
    return out


def norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x * (mean(x²) + eps)^-0.5`, times `weight`, computed in float32: [..., I] -> [..., I] in x's dtype.

    Where gradients are wanted or the library is missing, the twin; it agrees to rounding.
    """
    library = None if _differentiable(x, weight) else native.library()
    if library is None or x.dtype not in (torch.float32, torch.bfloat16):
        return reference.norm(x, weight, eps)
    flat = x.contiguous()
    out = torch.empty_like(flat)
    weight = None if weight is None else weight.float().contiguous()
    rows, width = flat.shape[:-1].numel(), flat.shape[-1]
    half, own = int(x.dtype == torch.bfloat16), native.address(weight)
    library.dgemma_norm(flat.data_ptr(), half, rows, width, own, eps, out.data_ptr(), native.threads())
    return out


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """`gelu(gates) * up`, GELU in its tanh form: [..., I] twice -> [..., I].

    In float32 where no gradients are wanted, by the library; else by torch. The two agree to rounding.
    """
    library = None if _differentiable(gates, up) else native.library()
    if library is None or gates.dtype != torch.float32:
        return F.gelu(gates, approximate="tanh") * up
    if gates.dim() != 2 or gates.stride() != up.stride() or gates.stride(1) != 1:
        gates, up = gates.contiguous(), up.contiguous()
    rows, width = gates.shape[:-1].numel(), gates.shape[-1]
    pitch, out = gates.stride(-2) if gates.dim() > 1 else width, torch.empty(gates.shape)
    library.dgemma_gate(gates.data_ptr(), up.data_ptr(), pitch, rows, width, out.data_ptr(), native.threads())
    return out


def read(scores: Tensor, wish: Wish, uniform: Tensor | None) -> tuple[Belief, Tensor, Tensor]:
    """Scores [n, V] float32 -> what is found, the weights exp(score - largest) [n, V] and their sums [n, 1].

    Overwrites `scores`. In float32 without a cap the division is the only rounding before the argmax, so the argmax is
    that of the twin; entropies and sums agree to rounding.

    Args:
        uniform: one number in [0, 1) a position: the sample is the first word whose cumulative weight is above that
            share of the total. None: the likeliest.
    """
    library = native.library()
    if library is None:
        return reference.read(scores, wish, uniform)
    assert scores.dtype == torch.float32 and scores.ndim == 2
    scores = scores.contiguous()
    uniform = None if uniform is None else uniform.float().contiguous()
    found, totals, plain = beliefs_of(len(scores), True)
    wanted, keep = wish.c(scores.shape[1])
    library.dgemma_read(
        native.address(scores),
        *scores.shape,
        ctypes.byref(wanted),
        native.address(uniform),
        ctypes.byref(plain),
        native.threads(),
    )
    del keep
    assert totals is not None
    return found, scores, totals


def vocabulary(
    hidden: Tensor,
    table: Weight | Tensor,
    wish: Wish,
    *,
    uniform: Tensor | None = None,
    hint: Tensor | None = None,
    soft: bool = True,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Look:
    """The vocabulary step: hidden states [n, H] -> what is found at each position, and the table's rows blended by
    their probabilities, float32 [n, H] (None unless `soft`).

    A packed table of 8 bits with one scale a row is walked once, in tiles of 512 words: the scores of a tile (with
    hidden states in 8 bits), then their weights relative to the largest score so far, then, with the weights in 8 bits
    (7 and a scale for every 64 words), the table's rows. No more than a tile's scores exist at a time. Other tables
    are done some positions at a time, float32 ones with torch's own tanh, so that the argmax is that of scores capped
    by torch.

    A position leaves a tile out of its blend if each 64 words of it have less than TOLERANCE / (V / 64) of all weight
    so far. What is left out is then at most TOLERANCE of all: the weight so far is no more than all of it, and there
    are V / 64 blocks. So a blend is wrong by no more than 2 * TOLERANCE times the table's largest entry (what is
    missing, and the share that the rest is short of 1): for a result in bfloat16 one unit in the last place of a
    number of that size, in float32 likewise.

    Args:
        hidden: float32 or bfloat16; the tolerance is that of its dtype.
        uniform: [n] in [0, 1), to sample with; None: the likeliest.
        hint: [n] int64, words that may be the likeliest (those of the last step, say): found early, they let more
            tiles be left out. Nothing else depends on them.
        product: of float activations and a table of floats, [n, H] and [V, H] -> [n, V].
    """
    if isinstance(table, Packed) and table.bits == 8 and table.group is None:
        return _fused(hidden, table, wish, uniform, hint, soft)
    plain = unpack(table) if isinstance(table, Packed) else table
    cap = wish.cap if isinstance(plain, Tensor) and plain.dtype == torch.float32 else None
    later = replace(wish, cap=None) if cap else wish
    looks: list[Look] = []
    for first in range(0, len(hidden), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        if isinstance(plain, Tensor):
            scores = product(hidden[part], plain).float()
        else:
            scores = reference.linear(hidden[part].float(), plain)
        if cap:
            scores = scores.div_(cap).tanh_().mul_(cap)
        own = None if uniform is None else uniform[part]
        found, weights, totals = read(scores, later.after(first), own)
        blend, share = _blend(weights, totals, plain, hidden.dtype, product) if soft else (None, 0.0)
        looks.append(Look(found, blend, share * len(scores) / len(hidden)))
    fields = (torch.cat(values) for values in zip(*(look.found for look in looks), strict=True))
    blends = torch.cat([look.soft for look in looks if look.soft is not None]) if soft else None
    return Look(Belief(*fields), blends, sum(look.share for look in looks))


def _fused(hidden: Tensor, table: Packed, wish: Wish, uniform: Tensor | None, hint: Tensor | None, soft: bool) -> Look:
    hidden = _rows(hidden, table)
    rows, library = len(hidden), _library()
    uniform = None if uniform is None else uniform.float().contiguous()
    hint = None if hint is None else hint.contiguous()
    found, _, plain = beliefs_of(rows, False)
    blends = torch.empty(rows, table.shape[1]) if soft else None
    matrix = table.c
    room = torch.empty(library.dgemma_vocabulary_room(rows, ctypes.byref(matrix), soft), dtype=torch.uint8)
    wanted, keep = wish.c(table.shape[0])
    taken = ctypes.c_int64()
    library.dgemma_vocabulary(
        *_input(hidden),
        ctypes.byref(matrix),
        ctypes.byref(wanted),
        native.address(uniform),
        native.address(hint),
        TOLERANCE[hidden.dtype],
        ctypes.byref(plain),
        native.address(blends),
        native.address(room),
        ctypes.byref(taken),
        native.threads(),
    )
    del keep
    return Look(found, blends, taken.value / max(1, rows * -(-table.shape[0] // BLOCK)))


def _blend(
    weights: Tensor,
    totals: Tensor,
    table: Quantized | Tensor,
    dtype: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, float]:
    """Weights [n, V] by their totals [n, 1] times the table, a slab of words at a time, without slabs that have next to
    none; and the share that took part."""
    total = torch.zeros(len(weights), table.shape[1])
    slabs, taken = -(-weights.shape[1] // SLAB), 0
    for first in range(0, weights.shape[1], SLAB):
        part = weights[:, first : first + SLAB]
        if slabs > 1:  # row by row, so that no row depends on another
            part = torch.where(part.sum(dim=-1, keepdim=True) > TOLERANCE[dtype] / slabs * totals, part, 0.0)
            if not part.any():
                continue
        taken += 1
        if isinstance(table, Tensor):
            total += product(part.to(table.dtype), table[first : first + SLAB].mT).float()
        else:
            total += part @ table[first : first + SLAB].dequantize()
    return total.div_(totals), taken / slabs


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(x: Tensor, weight: Weight) -> Tensor:
    """x as contiguous rows [T, I]."""
    assert x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] == weight.shape[-1]
    return x.reshape(-1, x.shape[-1]).contiguous()


def _input(x: Tensor) -> tuple[int | None, int, int]:
    return native.address(x), int(x.dtype == torch.bfloat16), len(x)


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None  # a packed weight is there, which only the library makes
    return library


def _plain(weight: Weight) -> Quantized:
    return unpack(weight) if isinstance(weight, Packed) else weight
