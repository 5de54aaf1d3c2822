"""What kernels share: products of tiles, rounding, the gated GELU, and weights as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized
from . import tiles

# The interpreter multiplies the bits of bfloat16 as if they were whole numbers, and does not round when it narrows.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
FP8_MOST = tl.constexpr(448.0)
LOG2_E = tl.constexpr(1.4426950408889634)


class Operand(NamedTuple):
    """A weight as kernels take it.

    Fields:
        data: [..., O, I], or [..., O, I/4] int16 words of four values.
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

    @property
    def span(self) -> int:
        """Inputs that activations have in `spread` order; 0: activations are as they are."""
        return tiles.span(self.group, self.shape[-1], len(self.shape) > 2) if self.form == "int4" else 0


def operand(weight: Tensor | Quantized) -> Operand:
    """A tensor or a weight in few bits, contiguous."""
    if isinstance(weight, Tensor):
        weight = weight.contiguous()
        return Operand(weight, weight, "float", 0, tuple(weight.shape))
    form, data = "fp8" if weight.floating else f"int{weight.bits}", weight.data.contiguous()
    data = data.view(torch.int16) if form == "int4" else data
    return Operand(data, weight.scales.contiguous(), form, weight.group or 0, weight.shape)


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


# Two words of four values of 4 bits from 0 to 15, and their scales: each value less 8, times its scale, as bfloat16.
# The first output has both words' first values, and so on. 0x4300 is 128 in bfloat16, whose last mantissa bit is worth
# 1, so a value is put there with one OR, and 136 is subtracted from pairs.
NIBBLES = tl.constexpr("""{
.reg .b32 b, c, d, one, less;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
shr.u32 b, $4, 4;
shr.u32 c, $4, 8;
shr.u32 d, $4, 12;
lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $2, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 $3, d, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, $0, one, less;
fma.rn.bf16x2 $1, $1, one, less;
fma.rn.bf16x2 $2, $2, one, less;
fma.rn.bf16x2 $3, $3, one, less;
mul.rn.bf16x2 $0, $0, $5;
mul.rn.bf16x2 $1, $1, $5;
mul.rn.bf16x2 $2, $2, $5;
mul.rn.bf16x2 $3, $3, $5;
}""")


@triton.jit
def nibbles(words, scales, dtype: tl.constexpr):
    """int16 words of four stored 4-bit values 0..15 each, and scales -> first, second, third and fourth values, less 8
    and scaled."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        scales = tl.broadcast_to(scales.to(tl.bfloat16), words.shape)
        return tl.inline_asm_elementwise(
            NIBBLES, "=&r,=&r,=&r,=&r,r,r", [words, scales], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
        )
    words = words.to(tl.int32)
    one = narrow(((words & 15).to(tl.float32) - 8.0) * scales, dtype)
    two = narrow(((words >> 4 & 15).to(tl.float32) - 8.0) * scales, dtype)
    three = narrow(((words >> 8 & 15).to(tl.float32) - 8.0) * scales, dtype)
    return one, two, three, narrow(((words >> 12 & 15).to(tl.float32) - 8.0) * scales, dtype)


@triton.jit
def widen(weight, dtype: tl.constexpr):
    """Values of a weight as the activations' dtype."""
    return weight if weight.dtype == dtype else narrow(weight.to(tl.float32), dtype)


@triton.jit
def scaled(x, by):
    """x times float32 numbers, in x's dtype."""
    if INTERPRETED:
        return narrow(x.to(tl.float32) * narrow(by, x.dtype).to(tl.float32), x.dtype)
    return x * by.to(x.dtype)


@triton.jit
def gelu(x):
    """GELU in its tanh form."""
    return x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481282 * x * x)))


@triton.jit
def fp8_scale(largest):
    """The scale that makes the largest of some numbers 448; 1 for zeros."""
    return tl.where(largest == 0.0, 1.0, largest / FP8_MOST)


@triton.jit
def put(out, scales, row, lanes, value, K, FORM: tl.constexpr, SPAN: tl.constexpr):
    """Writes a row's K numbers as a product with a weight wants them: [WIDTH], rounded to the network's dtype, zeros
    behind K.

    "fp8": divided by a scale that makes the largest 448. "int4": in `spread` order, of each SPAN inputs every fourth
    one from the first, then from the second, the third and the fourth; a row has K filled up to SPAN with zeros.
    """
    inside = lanes < K
    if FORM == "fp8":
        wide = value.to(tl.float32)
        scale = fp8_scale(tl.max(tl.abs(wide), 0))
        tl.store(out + row * K + lanes, narrow(wide / scale, tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)
    elif FORM == "int4":
        pitch = tl.cdiv(K, SPAN) * SPAN
        tl.store(out + row * pitch + spread(lanes, SPAN), value, mask=lanes < pitch)
    else:
        tl.store(out + row * K + lanes, value, mask=inside)


@triton.jit
def spread(lanes, SPAN: tl.constexpr):
    """Where an input goes in the order that "int4" wants."""
    return lanes // SPAN * SPAN + lanes % 4 * (SPAN // 4) + lanes % SPAN // 4


@triton.jit
def products(
    x, xs, rows, seen, w, ws, lines, held, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of x against rows of a weight: [BN, BM] float32, scales applied.

    Weights come first, because tokens are often fewer than the 64 rows that a Hopper product has on its left, and so
    that what is dequantised goes into it from registers. Both sides are read along K.

    Four bits are unpacked from words of four inputs, and each of the four meets every fourth input of x: those come in
    one piece (`put`), so both sides are read in whole lines and nothing is shuffled between registers. Scales of groups
    are applied to weights, rounded to x's dtype, so that sums are never interrupted.

    Args:
        rows, seen: [BM] rows of x [_, K] and which of them exist; in "int4" a row has K filled up to BK.
        lines, held: [BN] rows of w [_, K] and which of them exist.
        xs: scales of an FP8 x: a row each, or for each SPAN of its inputs, of which BK has some.
        GROUP: inputs that share a weight's scale, of which BK has some; 0: a row.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    w_rows = lines.to(tl.int64)[:, None]
    if FORM == "int4":
        x_rows = rows.to(tl.int64)[:, None] * (tl.cdiv(K, BK) * BK)
        pitch = K // GROUP * (GROUP // 4)  # K // 4, and known to be a multiple of 8
        quarter = tl.arange(0, BK // 4)[None, :]
        groups = tl.arange(0, BK // GROUP)[None, :]
        for first in range(0, K, BK):
            exists = first // 4 + quarter < pitch
            words = tl.load(w + w_rows * pitch + first // 4 + quarter, mask=held[:, None] & exists, other=0)
            known = held[:, None] & (first // GROUP + groups < K // GROUP)
            scale = tl.load(ws + w_rows * (K // GROUP) + first // GROUP + groups, mask=known, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], (BN, BK // GROUP, GROUP // 4))
            one, two, three, four = nibbles(words, tl.reshape(scale, (BN, BK // 4)), x.dtype.element_ty)
            there, exists = x + x_rows + first + quarter, seen[:, None] & exists
            acc = dot(one, tl.trans(tl.load(there, mask=exists, other=0.0)), acc)
            acc = dot(two, tl.trans(tl.load(there + BK // 4, mask=exists, other=0.0)), acc)
            acc = dot(three, tl.trans(tl.load(there + BK // 2, mask=exists, other=0.0)), acc)
            acc = dot(four, tl.trans(tl.load(there + BK // 4 * 3, mask=exists, other=0.0)), acc)
    elif SPAN:
        x_rows = rows.to(tl.int64)[:, None] * K
        scales = xs + rows.to(tl.int64) * tl.cdiv(K, SPAN)
        scale = tl.load(scales, mask=seen, other=0.0)
        for first in range(0, K, BK):
            for part in tl.static_range(BK // SPAN):
                inner = first + part * SPAN + tl.arange(0, SPAN)[None, :]
                weight = tl.load(w + w_rows * K + inner, mask=held[:, None] & (inner < K), other=0.0)
                value = tl.load(x + x_rows + inner, mask=seen[:, None] & (inner < K), other=0.0)
                place = rows * 0 + first // SPAN + part + 1
                following = tl.load(scales + place, mask=seen & (place * SPAN < K), other=0.0)  # before it is needed
                acc += dot(weight, tl.trans(value), tl.zeros((BN, BM), tl.float32)) * scale[None, :]
                scale = following
    else:
        x_rows = rows.to(tl.int64)[:, None] * K
        for first in range(0, K, BK):
            inner = first + tl.arange(0, BK)[None, :]
            weight = tl.load(w + w_rows * K + inner, mask=held[:, None] & (inner < K), other=0.0)
            value = tl.load(x + x_rows + inner, mask=seen[:, None] & (inner < K), other=0.0)
            if GROUP:
                groups = first // GROUP + tl.arange(0, BK // GROUP)[None, :]
                known = held[:, None] & (groups < K // GROUP)
                scale = tl.load(ws + w_rows * (K // GROUP) + groups, mask=known, other=0.0)
                scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BN, BK // GROUP, GROUP)), (BN, BK))
                weight = narrow(weight.to(tl.float32) * scale, value.dtype)
            acc = dot(widen(weight, value.dtype), tl.trans(value), acc)
    if FORM != "float" and not GROUP:
        acc *= tl.load(ws + lines, mask=held, other=0.0)[:, None]
    if FORM == "fp8" and not SPAN:
        acc *= tl.load(xs + rows, mask=seen, other=0.0)[None, :]
    return acc


def fits(weight: Tensor | Quantized) -> bool:
    """Whether the kernels have a product for it: floats; FP8 and int8 by row; whole numbers in groups of up
    to 128, of 32 at least in 4 bits."""
    if isinstance(weight, Tensor):
        return weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if weight.group is None:
        return weight.bits == 8
    return not weight.floating and weight.group in (16, 32, 64, 128)[weight.bits == 4 :]
