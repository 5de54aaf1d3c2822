"""What a step on a card is given: laid out by the host, packed into one piece of memory, sent in one transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import ModelConfig
from ..diffusion import Canvas
from ..kernels.triton.attention import Numbers, unroll
from ..model import Mode
from .board import likely_of, signed
from .forward import Work, encoding_of, fresh_of, table_of
from .fused import Layout, lay_out
from .pages import Pages, Table
from .ragged import Segment

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # numbers of segments that graphs are made for
ALIGNED = 16  # bytes at which kernels like tensors to begin


class Key(NamedTuple):
    """The shape of a step that a graph is made for.

    Fields:
        encoded, denoised, sampled: numbers of segments.
        pitch: rows of each that is encoded.
        width: rows of each that is denoised.
        draws: whether tokens are drawn.
        likely: whether some canvases or tokens are of likely words alone.
        splits: parts that keys are split in, by kind of layer.
    """

    encoded: int
    denoised: int
    sampled: int
    pitch: int
    width: int
    draws: bool
    likely: bool
    splits: tuple[int, int]


class Seated(NamedTuple):
    """A canvas at its place on the board, and the work of its step."""

    work: Work
    canvas: Canvas
    place: int


@dataclass(frozen=True)
class Inputs:
    """What a step is given.

    Fields:
        layout: where the rows of the forward belong.
        likely: whether some canvases or tokens are of likely words alone.
        tokens: int64 [E], of the rows that are encoded.
        spots: int64 [D], where on the board the other rows' tokens and soft embeddings are.
        rows: int64 [M * L], the rows of the forward that are the canvases to sample.
        places: int64 [M], the canvases' places on the board.
        lasts: int64 [N], the rows that a single token each is drawn behind: the last ones of all segments that are
            encoded, or none.
        asked: int64 [3, N], what they are drawn with (`Board.draw`).
        levels: float32 [4, N], see there.
    """

    layout: Layout
    likely: bool
    tokens: Tensor
    spots: Tensor
    rows: Tensor
    places: Tensor
    lasts: Tensor
    asked: Tensor
    levels: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        own = [self.tokens, self.spots, self.rows, self.places, self.lasts, self.asked, self.levels]
        return [*self.layout.tensors(), *own]

    def like(self, tensors: Iterator[Tensor]) -> Inputs:
        """The same with other tensors, in that order."""
        return Inputs(self.layout.like(tensors), self.likely, *tensors)

    def follow(self, works: Sequence[Work]) -> None:
        """Makes of a step on the host the one after it: the first segments encode another single token each, one place
        further in the same page.
        """
        count = len(works)
        for places in (self.layout.positions, *self.layout.slots.values()):
            places[:count].add_(1)
        for plan in self.layout.plans.values():
            plan.segments[:count, 2].add_(1)
        self.tokens[:count] = torch.tensor([fresh_of(work)[0] for work in works])
        if len(self.lasts):
            self.asked[1, :count] = torch.tensor([len(work.row.tokens) for work in works])


class Parcel:
    """The inputs of steps of one shape: in one piece of memory here, and in one on a device.

    Fields:
        here, there: the inputs as they are in each.

    Args:
        inputs: of that shape.
    """

    def __init__(self, inputs: Inputs, device: torch.device):
        tensors = inputs.tensors()
        ends = [*accumulate((-(-t.nbytes // ALIGNED) * ALIGNED for t in tensors), initial=0)]
        self._from = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._to = torch.empty(ends[-1], dtype=torch.uint8, device=device)

        def parts(whole: Tensor) -> Iterator[Tensor]:
            for begin, t in zip(ends, tensors, strict=False):
                yield whole[begin : begin + t.nbytes].view(t.dtype).view(t.shape)

        self.here, self.there = inputs.like(parts(self._from)), inputs.like(parts(self._to))
        self._parts = self.here.tensors()

    def pack(self, inputs: Inputs) -> None:
        """Takes over inputs; what was sent before has been used."""
        for part, tensor in zip(self._parts, inputs.tensors(), strict=True):
            part.copy_(tensor)

    def send(self) -> None:
        """Makes `there` what is `here`."""
        self._to.copy_(self._from, non_blocking=True)


class Planned(NamedTuple):
    """A step that the host has laid out.

    Fields:
        starts: where each segment's rows begin: those that are encoded, then the canvases.
        inputs: what it is given.
        key: its shape, by which a graph of it is known; None: no graph is made.
    """

    starts: list[int]
    inputs: Inputs
    key: Key | None


class Planner:
    """Lays steps out.

    Args:
        length: positions of the longest canvas.
        limit: tokens of a sequence at most.
        size: bytes of a key's number.
    """

    def __init__(self, config: ModelConfig, pages: Pages, *, length: int, limit: int, size: int):
        self._config, self._page, self._length, self._size = config, pages.size, length, size
        self._columns = -(-limit // pages.size) + 1
        self._nobody = Table(pages)

    def plan(
        self, encoding: Sequence[Work], denoising: Sequence[Seated], own: int, *, draws: Sequence[bool]
    ) -> Planned:
        """Lays a step out, of which the first `own` canvases are sampled on the board.

        Where every segment fits a canvas, each gets as many rows as the longest, but single tokens, where nothing else
        is encoded, one each; and their numbers are filled up to some that a graph is made for. Else, beside a prompt's
        long chunk, each has as many rows as tokens.

        Args:
            draws: of each that is encoded, whether a token is drawn behind it; if any is, one is behind each.
        """
        segments = [encoding_of(work) for work in encoding]
        segments += [
            Segment(table_of(o.work.row), len(o.work.row.history), o.work.denoised, Mode.DENOISE) for o in denoising
        ]
        count, more, sampled, columns = len(encoding), len(denoising), own, 1
        rooms, width = [s.length for s in segments], max([one.work.denoised for one in denoising], default=0)
        graphed = max(rooms) <= self._length
        if graphed:
            width = min(self._length, 1 << (max(rooms) - 1).bit_length())
            pitch = 1 if all(work.encode == 1 for work in encoding) else width
            count, more, sampled, columns = size_for(count), size_for(more), size_for(sampled), self._columns
            segments[len(encoding) : len(encoding)] = [self._fill(pitch)] * (count - len(encoding))
            segments += [self._fill(width)] * (count + more - len(segments))
            rooms = [pitch] * count + [width] * more
        layout = lay_out(
            segments, self._config, self._page,
            encoded=sum(rooms[:count]), rooms=rooms, columns=columns, size=self._size,
        )  # fmt: skip
        drawing = [one.canvas.params for one in denoising[:own]]
        drawing += [work.row.request.params for work, drawn in zip(encoding, draws, strict=True) if drawn]
        likely = any(params.likely_alone for params in drawing)
        key = Key(count, more, sampled, pitch, width, any(draws), likely, layout.splits) if graphed else None

        begins, lengths = layout.plans[False].segments[:, :2].numpy().astype(np.int64).T
        starts = [*begins[: len(encoding)].tolist(), *begins[count : count + len(denoising)].tolist()]
        tokens = np.zeros(layout.encoded, dtype=np.int64)
        for work, start in zip(encoding, starts, strict=False):
            tokens[start : start + work.encode] = fresh_of(work)
        canvases = self._canvases(denoising, begins[count:], np.array(rooms[count:]), width, own, sampled)
        lasts = (begins + lengths - 1)[: count if any(draws) else 0]
        others = (tokens, *canvases, lasts, *_asked(encoding, len(lasts)))
        return Planned(starts, Inputs(layout, likely, *map(torch.from_numpy, others)), key)

    def _fill(self, rows: int) -> Segment:
        """Rows of nobody, which are written nowhere and not read."""
        return Segment(self._nobody, 0, rows, Mode.DENOISE)

    def _canvases(
        self, denoising: Sequence[Seated], begins: Numbers, rooms: Numbers, width: int, own: int, sampled: int
    ) -> tuple[Numbers, Numbers, Numbers]:
        """`Inputs.spots`, `rows` and `places`, of canvases whose rows begin at `begins` and have room for `rooms`, fill
        among them. The first `own` are sampled, filled up to `sampled`: a place given twice changes nothing.
        """
        if not denoising:
            return begins[:0], begins[:0], begins[:0]
        places = np.array([one.place for one in denoising])
        lengths = np.array([one.work.denoised for one in denoising])
        whose, spots = unroll(rooms)
        chosen = np.arange(sampled)
        chosen[own:] = 0
        rows = begins[chosen, None] + np.minimum(np.arange(width), lengths[chosen, None] - 1)
        return places[np.minimum(whose, len(places) - 1)] * self._length + spots, rows.ravel(), places[chosen]


def _asked(works: Sequence[Work], count: int) -> tuple[Numbers, NDArray[np.float32]]:
    """`Inputs.asked` and `levels`, filled up to a count, which is 0 where no token is drawn."""
    asked, levels = np.zeros((3, count), dtype=np.int64), np.ones((4, count), dtype=np.float32)
    levels[[1, 3]] = 0.0  # nothing is restricted
    for number, work in enumerate(works[:count]):
        request, params = work.row.request, work.row.request.params
        asked[:, number] = signed(request.seed), len(work.row.tokens), params.temperature == 0
        levels[:, number] = params.temperature or 1.0, *likely_of(params)
    return asked, levels


def size_for(count: int) -> int:
    """The least number of segments that graphs are made for and that holds so many; 0 for none."""
    return next((size for size in (0, *SIZES) if size >= count), count)
