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
PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)  # instructions of NVIDIA's cards
FP8_MOST = tl.constexpr(448.0)
FOUR_BITS = ("int4", "nvfp4")
LOG2_E = tl.constexpr(1.4426950408889634)


class Operand(NamedTuple):
    """A weight as kernels take it.

    Fields:
        data: [..., O, I], or [..., O, I/4] int16 words of four values in 4 bits.
        scales: float32 [..., O, G], in "nvfp4" int32 words of four; `data` again where there are none (never read).
        factors: float32 [..., O, 1] of "nvfp4"; `data` again for others.
        form: "float", or that of `Quantized`.
        group: inputs that share a scale, or such a word; 0: all of a row.
        shape: (..., O, I).
    """

    data: Tensor
    scales: Tensor
    factors: Tensor
    form: str
    group: int
    shape: tuple[int, ...]

    @property
    def span(self) -> int:
        """Inputs that activations have in `spread` order; 0: activations are as they are."""
        return tiles.span(self.group, self.shape[-1], len(self.shape) > 2) if self.form in FOUR_BITS else 0


def operand(weight: Tensor | Quantized) -> Operand:
    """A tensor or a weight in few bits, contiguous."""
    data = (weight if isinstance(weight, Tensor) else weight.data).contiguous()
    if isinstance(weight, Tensor):
        return Operand(data, data, data, "float", 0, tuple(weight.shape))
    scales, factors, group = weight.scales.contiguous(), data, weight.group or 0
    if weight.factors is not None:
        scales, factors, group = scales.view(torch.int32), weight.factors.contiguous(), 4 * group
    own = data.view(torch.int16) if weight.form in FOUR_BITS else data
    return Operand(own, scales, factors, weight.form, group, weight.shape)


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


# Two words of four values of 4 bits, and their scales: each value times its scale, as bfloat16. The first output has
# both words' first values, and so on. `fma` with -0.0 is what cards before Hopper have in place of `mul`.
# Whole numbers, stored as value + 8: 0x4300 is 128 in bfloat16, whose last mantissa bit is worth 1, so a value is put
# there with one OR, and 136 is subtracted from pairs.
INT4 = tl.constexpr("""{
.reg .b32 b, c, d, one, less, none;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC308C308;
mov.b32 none, 0x80008000;
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
fma.rn.bf16x2 $0, $0, $5, none;
fma.rn.bf16x2 $1, $1, $5, none;
fma.rn.bf16x2 $2, $2, $5, none;
fma.rn.bf16x2 $3, $3, $5, none;
}""")
# E2M1: a code's sign goes to bfloat16's sign, and the rest to the last two bits of its exponent and the first one of
# its mantissa. That is the value (twice that of E2M1) times 2^-127, the subnormal one too, and the scale makes up for
# it: a value has 2 bits and its scale 4, so the product is exact.
E2M1 = tl.constexpr("""{
.reg .b32 a, b, c, d, none;
mov.b32 none, 0x80008000;
shl.b32 a, $4, 6;
shl.b32 b, $4, 2;
shr.u32 c, $4, 2;
shr.u32 d, $4, 6;
and.b32 a, a, 0x01C001C0;
and.b32 b, b, 0x01C001C0;
and.b32 c, c, 0x01C001C0;
and.b32 d, d, 0x01C001C0;
shl.b32 $0, $4, 12;
shl.b32 $1, $4, 8;
shl.b32 $2, $4, 4;
lop3.b32 $0, $0, none, a, 0xEA;
lop3.b32 $1, $1, none, b, 0xEA;
lop3.b32 $2, $2, none, c, 0xEA;
lop3.b32 $3, $4, none, d, 0xEA;
fma.rn.bf16x2 $0, $0, $5, none;
fma.rn.bf16x2 $1, $1, $5, none;
fma.rn.bf16x2 $2, $2, $5, none;
fma.rn.bf16x2 $3, $3, $5, none;
}""")
# Weights in "nvfp4" leave `unpacked` 256 times too small: the largest scale, 448, times 2^127 is no bfloat16.
LESS = tl.constexpr(256.0)


@triton.jit
def value_of(code, FORM: tl.constexpr):
    """Stored 4-bit values in the last bits of int32 words -> float32."""
    code = code & 15
    if FORM == "int4":
        return code.to(tl.float32) - 8.0
    size = code & 7
    size = tl.where(size < 4, size, (size & 1 | 2) << tl.maximum((size >> 1) - 1, 0))
    return tl.where(code < 8, size, -size).to(tl.float32)


@triton.jit
def nibbles(words, scales, FORM: tl.constexpr, dtype: tl.constexpr):
    """int16 words of four stored 4-bit values each, and scales -> first, second, third and fourth values, scaled."""
    if dtype == tl.bfloat16 and PTX:
        scales = scales if FORM == "int4" else scales * 1.7014118346046923e38  # 2^127
        scales = tl.broadcast_to(scales.to(tl.bfloat16), words.shape)
        return tl.inline_asm_elementwise(
            INT4 if FORM == "int4" else E2M1, "=&r,=&r,=&r,=&r,r,r", [words, scales], dtype=(tl.bfloat16,) * 4,
            is_pure=True, pack=2,
        )  # fmt: skip
    words = words.to(tl.int32)
    one = narrow(value_of(words, FORM) * scales, dtype)
    two = narrow(value_of(words >> 4, FORM) * scales, dtype)
    three = narrow(value_of(words >> 8, FORM) * scales, dtype)
    return one, two, three, narrow(value_of(words >> 12, FORM) * scales, dtype)


@triton.jit
def row_words(K, FORM: tl.constexpr, GROUP: tl.constexpr):
    """What a row of a weight has in memory: values, or words of four."""
    if FORM == "int4" or FORM == "nvfp4":
        return K // GROUP * (GROUP // 4)  # K // 4, and known to be a multiple of 8
    return K


@triton.jit
def unpacked(
    w, ws, rows, held, first, K, FORM: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """BK inputs from `first` of rows [BN, 1] of a weight in 4 bits, values times scales: every fourth one from the
    first, from the second, the third and the fourth, [BN, BK / 4] each."""
    pitch = row_words(K, FORM, GROUP)
    quarter = tl.arange(0, BK // 4)[None, :]
    words = tl.load(w + rows * pitch + first // 4 + quarter, mask=held & (first // 4 + quarter < pitch), other=0)
    groups = first // GROUP + tl.arange(0, BK // GROUP)[None, :]
    scale = tl.load(ws + rows * (K // GROUP) + groups, mask=held & (groups < K // GROUP), other=0)
    if FORM == "nvfp4":
        # Each byte at a word's top, in order; joined, as what is computed from places would not stay in registers. E4M3
        # in a float32's sign, last four bits of exponent and first three of mantissa is the scale times 2^-120.
        bytes = tl.join(tl.join(scale << 24, scale << 8), tl.join(scale << 16, scale))
        scale = (bytes >> 4 & -0x78100000).to(tl.float32, bitcast=True) * (2.0**112)  # 0x87F00000; LESS is 2^8
        scale = tl.broadcast_to(scale[:, :, :, :, None], (BN, BK // GROUP, 2, 2, GROUP // 16))
    else:
        scale = tl.broadcast_to(scale[:, :, None], (BN, BK // GROUP, GROUP // 4))
    return nibbles(words, tl.reshape(scale, (BN, BK // 4)), FORM, dtype)


@triton.jit
def widen(weight, dtype: tl.constexpr):
    """Values of a weight as the activations' dtype."""
    return weight if weight.dtype == dtype else narrow(weight.to(tl.float32), dtype)


@triton.jit
def times(x, by):
    """x times float32 numbers, in float32, rounded to x's dtype."""
    return narrow(x.to(tl.float32) * by, x.dtype)


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

    "fp8": divided by a scale that makes the largest 448. 4 bits: in `spread` order, of each SPAN inputs every fourth
    one from the first, then from the second, the third and the fourth; a row has K filled up to SPAN with zeros.
    """
    inside = lanes < K
    if FORM == "fp8":
        wide = value.to(tl.float32)
        scale = fp8_scale(tl.max(tl.abs(wide), 0))
        tl.store(out + row * K + lanes, narrow(wide / scale, tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)
    elif SPAN:
        pitch = tl.cdiv(K, SPAN) * SPAN
        tl.store(out + row * pitch + spread(lanes, SPAN), value, mask=lanes < pitch)
    else:
        tl.store(out + row * K + lanes, value, mask=inside)


@triton.jit
def spread(lanes, SPAN: tl.constexpr):
    """Where an input goes in the order that weights in 4 bits want."""
    return lanes // SPAN * SPAN + lanes % 4 * (SPAN // 4) + lanes % SPAN // 4


@triton.jit
def products(
    x, xs, rows, seen, w, ws, wf, lines, held, K,
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
        rows, seen: [BM] rows of x [_, K] and which of them exist; in 4 bits a row has K filled up to BK.
        lines, held: [BN] rows of w [_, K] and which of them exist.
        xs: scales of an FP8 x: a row each, or for each SPAN of its inputs, of which BK has some.
        GROUP: inputs that share a weight's scale (or a word of four), of which BK has some; 0: a row.
    """
    acc = tl.zeros((BN, BM), tl.float32)
    w_rows = lines.to(tl.int64)[:, None]
    if FORM == "int4" or FORM == "nvfp4":
        x_rows = rows.to(tl.int64)[:, None] * (tl.cdiv(K, BK) * BK)
        pitch, quarter = row_words(K, FORM, GROUP), tl.arange(0, BK // 4)[None, :]
        for first in range(0, K, BK):
            one, two, three, four = unpacked(
                w, ws, w_rows, held[:, None], first, K, FORM, GROUP, BN, BK, x.dtype.element_ty
            )
            there, exists = x + x_rows + first + quarter, seen[:, None] & (first // 4 + quarter < pitch)
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
    if FORM == "nvfp4":
        acc *= tl.load(wf + lines, mask=held, other=0.0)[:, None] * LESS
    if FORM == "fp8" and not SPAN:
        acc *= tl.load(xs + rows, mask=seen, other=0.0)[None, :]
    return acc


def fits(weight: Tensor | Quantized) -> bool:
    """Whether the kernels have a product for it: floats; FP8 and int8 by row; whole numbers in groups of up
    to 128, of 32 at least in 4 bits; NVFP4 with whole words of scales."""
    if isinstance(weight, Tensor):
        return weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if weight.factors is not None:
        return weight.scales.shape[-1] % 4 == 0
    if weight.group is None:
        return weight.bits == 8
    return not weight.floating and weight.group in (16, 32, 64, 128)[weight.bits == 4 :]
