"""Sizes of tiles, warps and stages by operation.

A Hopper multiprocessor has 227 KiB of shared memory, 64K registers of 4 bytes (at most 255 a thread) and multiplies 64
rows at a time; about 40 KiB of loads must be under way in each to keep the memory busy. Its tiles are the fastest of
those that `benchmarks/gpu_tiles.py` tried on an H100, at the 26B's sizes with 256 and 2,048 positions; between and
outside of these, by arithmetic. Other cards have as little as 64 KiB, and their sums take registers of their own beside
what is multiplied. Their tiles, and those of float32, which has no tensor cores, are smaller: of those that fit, what
the compiler keeps in registers. On such cards no tile has been timed yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from .common import Operand


class Card(NamedTuple):
    """What sizes depend on.

    Fields:
        shared: bytes of shared memory that a program can have.
        processors: multiprocessors.
        generation: of NVIDIA's tensor cores that take 64 rows and more at a time from shared memory: 9 or 10; else 0.
    """

    shared: int
    processors: int
    generation: int

    @property
    def large(self) -> bool:
        """Whether tiles can be large."""
        return self.generation > 0


SPARE = 4096  # bytes for what else a program has in shared memory
H100 = Card(shared=227 * 1024, processors=132, generation=9)


def card() -> Card:
    """The one that kernels are launched on; an H100 where there is none."""
    return _card(torch.cuda.current_device()) if torch.cuda.is_available() else H100


@functools.cache
def _card(number: int) -> Card:
    own = torch.cuda.get_device_properties(number)
    shared = getattr(own, "shared_memory_per_block_optin", own.shared_memory_per_block)
    known = torch.version.hip is None and own.major in (9, 10)
    return Card(shared=shared, processors=own.multi_processor_count, generation=own.major if known else 0)


def _exact(size: int) -> bool:
    """Whether numbers of so many bytes are multiplied without tensor cores. The interpreter has nothing to run out of,
    and is fastest with few programs."""
    return size > 2 and torch.cuda.is_available()


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


def experts(rows: int, gate_up: Operand, down: Operand, size: int = 2) -> tuple[Tile, Tile]:
    """For the two products of an expert that usually has so many rows; `size`: bytes of an activation."""
    pair = (FEW if rows <= 24 else MANY).get("int4" if gate_up.span else gate_up.form)
    if pair is None or down.form != gate_up.form or (_exact(size) and down.form != "fp8"):
        return product(rows, gate_up, 0, size), product(rows, down, down.shape[-2], size)
    tall = 16 if rows <= 8 else pair[0].rows
    first, second = (
        replace(tile, rows=tall, inner=own.span or tile.inner) for tile, own in zip(pair, (gate_up, down), strict=True)
    )
    return _fitted(first, gate_up, size, lines=2 * first.columns), _fitted(second, down, size)


def product(rows: int, weight: Operand, columns: int, size: int = 2) -> Tile:
    """For one product with few or many rows: weights are read once where a tile holds all rows. `size`: bytes of an
    activation."""
    tall = 16 if rows <= 8 else 32 if rows <= 24 else 64 if rows <= 96 else 128
    if _exact(size) and weight.form != "fp8":
        tile = Tile(rows=min(64, tall), columns=64, inner=weight.span or max(32, weight.group), warps=8, stages=2)
    elif weight.span and len(weight.shape) == 2 and rows > 96:
        tile = Tile(rows=128 if columns >= 8192 else 64, columns=128, inner=weight.span, warps=8)
    elif weight.form == "fp8" and len(weight.shape) == 2 and rows > 96:
        tile = Tile(rows=64, columns=64, inner=128, stages=4)
    else:
        inner = weight.span or (128 if weight.form == "fp8" else max(64, weight.group))
        wide = 64 if columns <= 1024 or tall == 128 else 128
        deep = 2 if tall * inner > 16384 else 3
        tile = Tile(rows=tall, columns=wide, inner=inner, warps=4 if tall * wide <= 4096 else 8, stages=deep)
    return _fitted(tile, weight, size, lines=tile.columns if columns else 2 * tile.columns)


def _fitted(tile: Tile, weight: Operand, size: int, lines: int | None = None) -> Tile:
    """With fewer stages and less of the summed width at a time, so that the loads under way fit the card; and with more
    warps for many sums where those are not Hopper's.

    Args:
        lines: rows of the weight that a program takes; None: as many as outputs.
    """
    size = 1 if weight.form == "fp8" else size  # activations are in FP8 too
    own = {"fp8": 1.0, "int8": 1.0, "int4": 0.5, "nvfp4": 0.5}.get(weight.form, size)
    each = tile.rows * size + (lines or tile.columns) * own

    def fits(tile: Tile) -> bool:
        return tile.stages * each * tile.inner <= card().shared - SPARE

    if card().generation != 9 and tile.rows * (lines or tile.columns) >= 8192:
        tile = replace(tile, warps=8)
    while tile.stages > 3 and not fits(tile):
        tile = replace(tile, stages=tile.stages - 1)
    while tile.inner > max(64, weight.span, weight.group) and not fits(tile):
        tile = replace(tile, inner=tile.inner // 2)
    return tile if fits(tile) else replace(tile, stages=2)


def programs() -> int:
    """That a card should have at once: two for each multiprocessor."""
    return 2 * card().processors


def attention(head_dim: int, size: int = 2) -> Tile:
    """For attention; `size`: bytes of a key's number. On an H100 the sums of 64 rows of 512 or 128 rows of 256 take
    half of a multiprocessor's registers.

    `rows` are pairs of a query and a head, `columns` keys.
    """
    if _exact(size):
        return Tile(rows=16 if head_dim > 256 else 32, columns=32 if head_dim <= 64 else 16, warps=8, stages=1)
    if head_dim <= 64:
        return Tile(rows=64, columns=32, warps=4, stages=2)
    if not card().large:
        return Tile(rows=32 if head_dim > 256 else 64, columns=16 if head_dim > 256 else 32, warps=8, stages=2)
    if head_dim > 256:
        return Tile(rows=64, columns=32, warps=8, stages=2)
    return Tile(rows=128, columns=64, warps=8, stages=2)


def least_keys(head_dim: int) -> int:
    """That a part has where keys are split, so that merging stays cheap beside it."""
    return 512 if head_dim > 256 else 256


def vocabulary(positions: int, form: str, size: int = 2) -> Tile:
    """For scores: `columns` are the words of a tile, which the blend takes or leaves as one. `size`: bytes of an
    activation."""
    if _exact(size):
        return Tile(rows=64, columns=128, inner=32, warps=8, stages=2)
    rows = 64 if positions <= 64 else 128 if positions <= 128 or card().generation != 9 else 256
    tile = Tile(rows=rows, columns=128, inner=128 if form == "fp8" else 64, warps=8, stages=4)
    return tile if card().large else replace(tile, inner=tile.inner // 2)


def blend(positions: int, size: int = 2) -> Tile:
    """For the table's blend: `columns` are of the hidden width, `inner` words. `size`: bytes of a weight."""
    if _exact(size):
        return Tile(rows=64, columns=128, inner=32, warps=8, stages=2)
    if positions <= 64:
        return Tile(rows=64, columns=128, inner=64, warps=8, stages=4)
    if not card().large:
        return Tile(rows=128, columns=128, inner=32, warps=8, stages=4)
    return Tile(rows=128, columns=256, inner=64, warps=8, stages=4)
