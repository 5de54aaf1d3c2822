"""Sizes of tiles, warps and stages by operation. All of them follow from arithmetic; none is measured yet.

A Hopper multiprocessor has 227 KiB of shared memory, 64K registers of 4 bytes (at most 255 a thread) and multiplies 64
rows at a time; about 40 KiB of loads must be under way in each to keep the memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def product(rows: int, weight: Operand, columns: int) -> Tile:
    """For products with few or many rows an expert (or in all): weights are read once where a tile holds all rows."""
    tall = 16 if rows <= 8 else 32 if rows <= 24 else 64 if rows <= 96 else 128
    inner = weight.span or (128 if weight.form == "fp8" else max(64, weight.group))
    wide = 64 if columns <= 1024 or tall == 128 else 128
    deep = 2 if tall * inner > 16384 else 3
    return Tile(rows=tall, columns=wide, inner=inner, warps=4 if tall * wide <= 4096 else 8, stages=deep)


PROGRAMS = 264  # that a card should have at once: two for each of an H100's multiprocessors
LEAST_KEYS = 256  # of a part, so that merging stays cheap beside it


def attention(head_dim: int) -> Tile:
    """For attention: the sums of 64 rows of 512 or 128 rows of 256 take half of a multiprocessor's registers.

    `rows` are pairs of a query and a head, `columns` keys.
    """
    if head_dim > 256:
        return Tile(rows=64, columns=32, warps=8, stages=2)
    if head_dim > 64:
        return Tile(rows=128, columns=64, warps=8, stages=2)
    return Tile(rows=64, columns=32, warps=4, stages=2)


def vocabulary(positions: int) -> Tile:
    """For scores: `columns` are the words of a tile, which the blend takes or leaves as one."""
    return Tile(rows=64 if positions <= 64 else 128, columns=128, inner=64, warps=8, stages=3)


def blend(positions: int) -> Tile:
    """For the table's blend: `inner` is of the hidden width."""
    return Tile(rows=64 if positions <= 64 else 128, columns=128, inner=128, warps=8, stages=3)
