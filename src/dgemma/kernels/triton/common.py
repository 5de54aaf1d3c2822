"""What kernels share: products of tiles, rounding, the gated GELU, and weights as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized

# The interpreter multiplies the bits of bfloat16 as if they were whole numbers, and does not round when it narrows.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FP8_MOST = tl.constexpr(448.0)


class Operand(NamedTuple):
    """A weight as kernels take it.

    Fields:
        data: [..., O, I], or [..., O, I/2] bytes.
        scales: float32 [..., O, G]; `data` again where there are none (never read).
        form: "float", "fp8", "int8" or "int4".
        group: inputs that share a scale; 0: all of a row.
        shape: (..., O, I).
    """

    data: Tensor
    scales: Tensor
    form: str
    group: int
    shape: tuple[int, ...]


def operand(weight: Tensor | Quantized) -> Operand:
    """A tensor or a weight in few bits, contiguous."""
    if isinstance(weight, Tensor):
        weight = weight.contiguous()
        return Operand(weight, weight, "float", 0, tuple(weight.shape))
    form = "fp8" if weight.floating else f"int{weight.bits}"
    return Operand(weight.data.contiguous(), weight.scales.contiguous(), form, weight.group or 0, weight.shape)


def halves(x: Tensor, group: int) -> Tensor:
    """Rows in the order in which the 4-bit product wants them: of each group the even inputs, then the odd ones.

    A byte holds two neighbouring values, so its low halves meet the even inputs and its high halves the odd ones; with
    each kind in one piece both are read in whole lines, and nothing is shuffled between registers.
    """
    return x.unflatten(-1, (-1, group // 2, 2)).transpose(-1, -2).reshape(x.shape)


def power(count: int) -> int:
    """The power of two at or above a count."""
    return 1 << max(0, count - 1).bit_length()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, summed in float32: float32 operands exactly, FP8 with sums carried over to float32 after each tile
    (Hopper's own FP8 sums keep 14 bits)."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if a.dtype == tl.float8e4nv:
        return tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> dtype, to the nearest, half to even; FP8 saturates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return nearest.to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)
    if INTERPRETED and dtype == tl.float8e4nv:
        size = tl.minimum(tl.abs(x), FP8_MOST)
        exponent = tl.maximum(((size.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -6)
        steps = size * ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # times 2^(3 - exponent)
        code = (exponent + 6) * 8 + ((steps + 12582912.0) - 12582912.0).to(tl.int32)
        code = tl.where(x != x, 127, code) | tl.where(x < 0, 128, 0)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(dtype)


@triton.jit
def signed(nibble, dtype: tl.constexpr):
    """A stored 4-bit value 0..15 -> -8..7."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        # 0x4300 is 128 in bfloat16, whose last mantissa bit is worth 1. Conversions run at a quarter of this rate.
        return (nibble.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    return (nibble.to(tl.float32) - 8.0).to(dtype)


@triton.jit
def widen(weight, dtype: tl.constexpr):
    """Values of a weight as the activations' dtype."""
    return weight if weight.dtype == dtype else narrow(weight.to(tl.float32), dtype)


@triton.jit
def gelu(x):
    """GELU in its tanh form."""
    return x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481282 * x * x)))


@triton.jit
def fp8_scale(largest):
    """The scale that makes the largest of some numbers 448; 1 for zeros."""
    return tl.where(largest == 0.0, 1.0, largest / FP8_MOST)


@triton.jit
def products(
    x, xs, rows, seen, w, ws, lines, held, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of x against rows of a weight: [BN, BM] float32, scales applied.

    Weights come first, because tokens are often fewer than the 64 rows that a Hopper product has on its left, and so
    that what is dequantised goes into it from registers. Both sides are read along K.

    Args:
        rows, seen: [BM] rows of x [_, K] and which of them exist.
        lines, held: [BN] rows of w [_, K] and which of them exist.
        xs: scales of an FP8 x: a row each, or for each SPAN of its inputs.
        GROUP: inputs that share a weight's scale; 0: a row. Where there are groups or spans, BK is as wide.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    x_rows, w_rows = rows.to(tl.int64)[:, None] * K, lines.to(tl.int64)[:, None]
    for first in range(0, K, BK):
        if FORM == "int4":
            half = tl.arange(0, BK // 2)[None, :]
            packed = tl.load(w + w_rows * (K // 2) + first // 2 + half, mask=held[:, None], other=0)
            even = tl.load(x + x_rows + first + half, mask=seen[:, None], other=0.0)
            odd = tl.load(x + x_rows + first + BK // 2 + half, mask=seen[:, None], other=0.0)
            part = dot(signed(packed & 15, even.dtype), tl.trans(even), tl.zeros((BN, BM), tl.float32))
            part = dot(signed(packed >> 4, odd.dtype), tl.trans(odd), part)
        else:
            inner = first + tl.arange(0, BK)[None, :]
            weight = tl.load(w + w_rows * K + inner, mask=held[:, None] & (inner < K), other=0.0)
            value = tl.load(x + x_rows + inner, mask=seen[:, None] & (inner < K), other=0.0)
            if GROUP or SPAN:
                part = dot(widen(weight, value.dtype), tl.trans(value), tl.zeros((BN, BM), tl.float32))
            else:
                acc = dot(widen(weight, value.dtype), tl.trans(value), acc)
        if GROUP or SPAN:
            if GROUP:
                scale = tl.load(ws + lines.to(tl.int64) * (K // GROUP) + first // GROUP, mask=held, other=0.0)
                part *= scale[:, None]
            if SPAN:
                scale = tl.load(xs + rows.to(tl.int64) * tl.cdiv(K, SPAN) + first // SPAN, mask=seen, other=0.0)
                part *= scale[None, :]
            acc += part
    if FORM != "float" and not GROUP:
        acc *= tl.load(ws + lines, mask=held, other=0.0)[:, None]
    if FORM == "fp8" and not SPAN:
        acc *= tl.load(xs + rows, mask=seen, other=0.0)[None, :]
    return acc


def fits(weight: Tensor | Quantized) -> bool:
    """Whether the kernels have a product for it: floats; FP8 and int8 by row; whole numbers in groups of 32 to 128."""
    if isinstance(weight, Tensor):
        return weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if weight.group is None:
        return weight.bits == 8
    return not weight.floating and weight.group in (32, 64, 128)
