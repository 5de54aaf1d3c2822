"""Sizes of tiles, warps and stages by operation: the fastest of those that `benchmarks/gpu_tiles.py` tried on an H100,
at the 26B's sizes with 256 and 2,048 positions; between and outside of these, by arithmetic.

A Hopper multiprocessor has 227 KiB of shared memory, 64K registers of 4 bytes (at most 255 a thread) and multiplies 64
rows at a time; about 40 KiB of loads must be under way in each to keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .common import Operand


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program does.

    Fields:
        rows: tokens.
        columns: outputs (words in the vocabulary step, keys in attention).
        inner: of the summed width at a time.
        warps: of 32 threads.
        stages: loads under way at once.
    """

    rows: int
    columns: int
    inner: int = 0
    warps: int = 4
    stages: int = 3


def span(group: int, inputs: int, many: bool) -> int:
    """Of 4-bit products: how many inputs a program sums at a time; `many`: experts, which have few rows each."""
    return max(group, 64 if inputs < 256 else 256 if many else 128)


# Of an expert's products with up to 24 rows, and with more: gate and up, and down. "float" is bfloat16, and "int4" all
# that is in 4 bits.
FEW = {
    "fp8": (Tile(rows=32, columns=64, inner=256, warps=8, stages=4), Tile(rows=32, columns=64, inner=64, stages=4)),
    "int4": (Tile(rows=32, columns=32, inner=256), Tile(rows=32, columns=64, inner=256, stages=2)),
    "float": (Tile(rows=32, columns=32, inner=64), Tile(rows=32, columns=64, inner=64, stages=4)),
}
MANY = {
    "fp8": (Tile(rows=64, columns=64, inner=128, stages=4), Tile(rows=64, columns=128, inner=64, stages=4)),
    "int4": (
        Tile(rows=64, columns=64, inner=256, warps=8, stages=2),
        Tile(rows=64, columns=128, inner=256, warps=8, stages=2),
    ),
}


def experts(rows: int, gate_up: Operand, down: Operand) -> tuple[Tile, Tile]:
    """For the two products of an expert that usually has so many rows."""
    pair = (FEW if rows <= 24 else MANY).get("int4" if gate_up.span else gate_up.form)
    if pair is None or down.form != gate_up.form:
        return product(rows, gate_up, 0), product(rows, down, down.shape[-2])
    tall = 16 if rows <= 8 else pair[0].rows
    first, second = (
        replace(tile, rows=tall, inner=own.span or tile.inner) for tile, own in zip(pair, (gate_up, down), strict=True)
    )
    return first, second


def product(rows: int, weight: Operand, columns: int) -> Tile:
    """For one product with few or many rows: weights are read once where a tile holds all rows."""
    if weight.span and len(weight.shape) == 2 and rows > 96:
        return Tile(rows=128 if columns >= 8192 else 64, columns=128, inner=weight.span, warps=8)
    if weight.form == "fp8" and len(weight.shape) == 2 and rows > 96:
        return Tile(rows=64, columns=64, inner=128, stages=4)
    tall = 16 if rows <= 8 else 32 if rows <= 24 else 64 if rows <= 96 else 128
    inner = weight.span or (128 if weight.form == "fp8" else max(64, weight.group))
    wide = 64 if columns <= 1024 or tall == 128 else 128
    deep = 2 if tall * inner > 16384 else 3
    return Tile(rows=tall, columns=wide, inner=inner, warps=4 if tall * wide <= 4096 else 8, stages=deep)


PROGRAMS = 264  # that a card should have at once: two for each of an H100's multiprocessors


def attention(head_dim: int, wide: bool = False) -> Tile:
    """For attention: the sums of 64 rows of 512 or 128 rows of 256 take half of a multiprocessor's registers.

    `rows` are pairs of a query and a head, `columns` keys; `wide`: in float32, of which shared memory holds fewer keys.
    """
    if wide and head_dim > 128:
        return replace(attention(head_dim), columns=16 if head_dim > 256 else 32, stages=1)
    if head_dim > 256:
        return Tile(rows=64, columns=32, warps=8, stages=2)
    if head_dim > 64:
        return Tile(rows=128, columns=64, warps=8, stages=2)
    return Tile(rows=64, columns=32, warps=4, stages=2)


def least_keys(head_dim: int) -> int:
    """That a part has where keys are split, so that merging stays cheap beside it."""
    return 512 if head_dim > 256 else 256


def vocabulary(positions: int, form: str, wide: bool = False) -> Tile:
    """For scores: `columns` are the words of a tile, which the blend takes or leaves as one; `wide`: in float32."""
    if wide:
        return Tile(rows=64 if positions <= 64 else 128, columns=128, inner=64, warps=8, stages=2)
    rows = 64 if positions <= 64 else 128 if positions <= 128 else 256
    return Tile(rows=rows, columns=128, inner=128 if form == "fp8" else 64, warps=8, stages=4)


def blend(positions: int) -> Tile:
    """For the table's blend: `columns` are of the hidden width, `inner` words."""
    return Tile(
        rows=64 if positions <= 64 else 128, columns=256 if positions > 64 else 128, inner=64, warps=8, stages=4
    )
