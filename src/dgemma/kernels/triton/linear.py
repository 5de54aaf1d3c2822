"""Products of activations and one weight: float, FP8 (activations too), 8 and 4 bits dequantised in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant import Quantized
from .common import Operand, fp8_scale, halves, narrow, operand, power, products
from .tiles import Tile, product


@triton.jit
def _fp8_kernel(x, out, scales, K, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, WIDTH)
    value = tl.load(x + row * K + inner, mask=inner < K, other=0.0).to(tl.float32)
    scale = fp8_scale(tl.max(tl.abs(value), 0))
    tl.store(out + row * K + inner, narrow(value / scale, tl.float8e4nv), mask=inner < K)
    tl.store(scales + row, scale)


@triton.jit
def _linear_kernel(
    x, xs, w, ws, out, T, N, K,
    FORM: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same weights and other tokens, so that weights come from memory once.
    tall = tl.cdiv(T, BM)
    rows = tl.program_id(0) % tall * BM + tl.arange(0, BM)
    lines = tl.program_id(0) // tall * BN + tl.arange(0, BN)
    acc = products(x, xs, rows, rows < T, w, ws, lines, lines < N, K, FORM, GROUP, 0, BM, BN, BK)
    places = out + rows.to(tl.int64)[None, :] * N + lines[:, None]
    tl.store(places, narrow(acc, out.dtype.element_ty), mask=(rows < T)[None, :] & (lines < N)[:, None])


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, I] -> float8_e4m3fn [T, I] and scales [T, 1]: the largest of a row becomes 448."""
    out, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(len(x), 1, device=x.device)
    if len(x):
        width = power(x.shape[1])
        _fp8_kernel[(len(x),)](x, out, scales, x.shape[1], WIDTH=width, num_warps=8 if width >= 2048 else 4)
    return out, scales


def activations(x: Tensor, weight: Operand) -> tuple[Tensor, Tensor]:
    """x [T, I] as the product with a weight wants it, and its scales (x again where there are none)."""
    x = x.contiguous()
    if weight.form == "fp8":
        return fp8_rows(x)
    return (halves(x, weight.group), x) if weight.form == "int4" else (x, x)


def linear(
    x: Tensor, weight: Tensor | Quantized, *, tile: Tile | None = None, ready: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`x @ weight.T`: [..., I] and [O, I] -> [..., O] in x's dtype. For weights that `common.fits`.

    Args:
        ready: `activations` of x, where several weights of one form and group meet it.
    """
    own = operand(weight)
    flat = x.reshape(-1, x.shape[-1])
    rows, (outputs, inputs) = len(flat), own.shape
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    tile = tile or product(rows, own.form, own.group, outputs)
    if rows:
        value, scales = ready or activations(flat, own)
        grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.columns),)
        _linear_kernel[grid](
            value, scales, own.data, own.scales, out, rows, outputs, inputs,
            FORM=own.form, GROUP=own.group, BM=tile.rows, BN=tile.columns, BK=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out.view(*x.shape[:-1], outputs)
