"""Products of activations and one weight: float, FP8 (activations too), 8 and 4 bits dequantised in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized
from . import tiles
from .common import LESS, Operand, narrow, operand, power, products, put, times, unpacked
from .tiles import Tile


class Ready(NamedTuple):
    """Activations as a product wants them (`common.put`): [T, I], or [T, I filled up], and scales [T, 1] of FP8
    (values again where there are none).
    """

    values: Tensor
    scales: Tensor


@triton.jit
def _ready_kernel(x, out, scales, K, FORM: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    put(out, scales, row, lanes, tl.load(x + row * K + lanes, mask=lanes < K, other=0.0), K, FORM, SPAN)


@triton.jit
def _linear_kernel(
    x, xs, w, ws, wf, out, T, N, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same weights and other tokens, so that weights come from memory once.
    tall = tl.cdiv(T, BM)
    rows = tl.program_id(0) % tall * BM + tl.arange(0, BM)
    lines = tl.program_id(0) // tall * BN + tl.arange(0, BN)
    acc = products(x, xs, rows, rows < T, w, ws, wf, lines, lines < N, K, FORM, GROUP, 0, BM, BN, BK)
    places = out + rows.to(tl.int64)[None, :] * N + lines[:, None]
    tl.store(places, narrow(acc, out.dtype.element_ty), mask=(rows < T)[None, :] & (lines < N)[:, None])


@triton.jit
def _widen_kernel(w, ws, wf, out, N, K, FORM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    lines = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    held, first = lines < N, tl.program_id(0) * BK
    if FORM == "int4" or FORM == "nvfp4":
        one, two, three, four = unpacked(w, ws, lines, held, first, K, FORM, GROUP, BN, BK, out.dtype.element_ty)
        if FORM == "nvfp4":
            factor = tl.load(wf + lines, mask=held, other=0.0) * LESS
            one, two, three, four = times(one, factor), times(two, factor), times(three, factor), times(four, factor)
        there = out + lines * (tl.cdiv(K, BK) * BK) + first + tl.arange(0, BK // 4)[None, :]
        tl.store(there, one, mask=held)
        tl.store(there + BK // 4, two, mask=held)
        tl.store(there + BK // 2, three, mask=held)
        tl.store(there + BK // 4 * 3, four, mask=held)
    else:
        inner = first + tl.arange(0, BK)[None, :]
        there, group = held & (inner < K), inner // GROUP if GROUP else 0
        scale = tl.load(ws + lines * (K // GROUP if GROUP else 1) + group, mask=there, other=0.0)
        value = tl.load(w + lines * K + inner, mask=there, other=0).to(tl.float32) * scale
        tl.store(out + lines * K + inner, narrow(value, out.dtype.element_ty), mask=there)


def widened(weight: Operand, dtype: torch.dtype) -> Tensor:
    """A weight of whole numbers as floats, [O, I] with inputs in the order of activations that are `ready` for it."""
    outputs, inputs = weight.shape
    span = weight.span or 128
    width = triton.cdiv(inputs, span) * span if weight.span else inputs
    out = torch.empty(outputs, width, dtype=dtype, device=weight.data.device)
    _widen_kernel[(triton.cdiv(inputs, span), triton.cdiv(outputs, 64))](
        weight.data, weight.scales, weight.factors, out, outputs, inputs,
        FORM=weight.form, GROUP=weight.group, BN=64, BK=span,
    )  # fmt: skip
    return out


def room(rows: int, like: Tensor, weight: Operand) -> Ready:
    """Memory for so many rows of activations that meet a weight, not yet filled; `like` has their dtype and device."""
    width = weight.shape[-1]
    if weight.form == "fp8":
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=like.device)
        return Ready(values, torch.empty(rows, 1, device=like.device))
    width = triton.cdiv(width, weight.span) * weight.span if weight.span else width
    values = torch.empty(rows, width, dtype=like.dtype, device=like.device)
    return Ready(values, values)


def ready(x: Tensor, weight: Operand) -> Ready:
    """x [T, I] as the product with a weight wants it."""
    x = x.contiguous()
    if weight.form != "fp8" and not weight.span:
        return Ready(x, x)
    out, width = room(len(x), x, weight), power(x.shape[1])
    if len(x):
        _ready_kernel[(len(x),)](
            x, out.values, out.scales, x.shape[1],
            FORM=weight.form, SPAN=weight.span, WIDTH=width, num_warps=8 if width >= 2048 else 4,
        )  # fmt: skip
    return out


def product(own: Ready, weight: Operand, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """`x @ weight.T` of activations that are ready: [T, I] and [O, I] -> [T, O]."""
    rows, (outputs, inputs) = len(own.values), weight.shape
    out = torch.empty(rows, outputs, dtype=dtype, device=own.values.device)
    tile = tile or tiles.product(rows, weight, outputs, dtype.itemsize)
    if rows:
        _linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),)](
            *own, weight.data, weight.scales, weight.factors, out, rows, outputs, inputs,
            FORM=weight.form, GROUP=weight.group, BM=tile.rows, BN=tile.columns, BK=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor | Quantized) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] -> [..., O] in x's dtype. For weights that `common.fits`."""
    own = operand(weight)
    out = product(ready(x.reshape(-1, x.shape[-1]), own), own, x.dtype)
    return out.view(*x.shape[:-1], own.shape[0])
