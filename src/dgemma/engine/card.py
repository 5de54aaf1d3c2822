"""A step on a GPU: one forward and all sampling in one go, replayed as a CUDA graph where its shape has come before.

The host says what is where, starts a step, and hears a byte of each canvas when it is done. Canvases stay on the card
(`board.py`) until they are over. Requests that want more of their scores than the card's sampler does (top-k, top-p,
min-p, biases, log-probabilities) are sampled as on a CPU, from the same forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion import Canvas
from ..diffusion.canvas import not_numbers
from ..errors import DGemmaError
from ..kernels.triton import layer
from ..kernels.triton.settle import BROKEN, OVER
from ..model import Mode, Network
from .board import Board
from .forward import Forward, Work, encoding_of, fresh_of, is_next, table_of
from .fused import Fused, Layout, lay_out
from .pages import Pages, Table
from .ragged import Segment
from .row import Row

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # numbers of segments that graphs are made for


@dataclass(frozen=True)
class Inputs:
    """What a step is given.

    Fields:
        layout: where the rows of the forward belong.
        tokens: int64 [E], of the rows that are encoded.
        spots: int64 [D], where on the board the other rows' tokens and soft embeddings are.
        rows: int64 [M * L], the rows of the forward that are the canvases to sample.
        places: int64 [M], the canvases' places on the board.
    """

    layout: Layout
    tokens: Tensor
    spots: Tensor
    rows: Tensor
    places: Tensor

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.layout.tensors(), self.tokens, self.spots, self.rows, self.places]

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        own = (t.to(device, non_blocking=True) for t in (self.tokens, self.spots, self.rows, self.places))
        return Inputs(self.layout.to(device), *own)


class Seated(NamedTuple):
    """A canvas at its place on the board, and the work of its step."""

    work: Work
    canvas: Canvas
    place: int


class Outputs(NamedTuple):
    """What it gives: hidden states [T, H], and uint8 [M + E]: how the canvases stand, and which encoded rows are sound
    (1: all of them numbers).
    """

    hidden: Tensor
    flags: Tensor


class Graph:
    """A step of one shape. The first call does it and prepares what is compiled and tuned at first use; the second one
    records it; from then on it is one launch. On other devices than CUDA it is done each time.

    Args:
        compute: the step.
        pool: memory that graphs share, since no two run at once; None where there are none.
    """

    def __init__(self, compute: Callable[[Inputs], Outputs], pool: Any):
        self._compute, self._pool = compute, pool
        self._given: Inputs | None = None
        self._inputs: Inputs | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs | None = None

    def __call__(self, inputs: Inputs, device: torch.device) -> Outputs:
        """Does the step, with inputs from the host. The outputs are overwritten by the next one."""
        if self._inputs is None:
            self._inputs, self._given = inputs.to(device), inputs
            return self._compute(self._inputs)
        if inputs is not self._given:
            for own, new in zip(self._inputs.tensors(), inputs.tensors(), strict=True):
                own.copy_(new, non_blocking=True)
            self._given = inputs
        if self._pool is None:
            return self._compute(self._inputs)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, a server's or NCCL's, is none of the graph's business.
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._outputs = self._compute(self._inputs)
        self._graph.replay()
        assert self._outputs is not None
        return self._outputs


class Planned(NamedTuple):
    """A step that the host has laid out: where each segment's rows begin, what it is given, and the graph that does it,
    if there is one.
    """

    starts: list[int]
    inputs: Inputs
    graph: Graph | None


class CardForward(Forward):
    """The network, its cache and the canvases under way, on a GPU.

    Args:
        canvases: at once.
        limit: tokens of a sequence at most.
    """

    def __init__(self, network: Network, pages: Pages, *, canvases: int, limit: int):
        super().__init__(network, pages)
        self.fused = Fused(network, self.store)
        self.board = Board(network, canvases, network.config.canvas_length)
        self._seats: list[Canvas | None] = [None] * canvases
        self._columns = -(-limit // pages.size) + 1
        self._nobody = Table(pages)
        self._graphs: dict[tuple[object, ...], Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if network.device.type == "cuda" else None
        self._last: tuple[object, Planned] | None = None

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[tuple[Row, DGemmaError]]:
        encoding = [work for work in works if work.encode]
        denoising = self._seat([work for work in works if work.denoise])
        denoising.sort(key=lambda one: not Board.takes(one.canvas))
        own = sum(Board.takes(one.canvas) for one in denoising)
        for work, canvas, place in denoising[own:]:
            self.board.put(place, canvas.tokens[0], None if work.row.soft is None else work.row.soft[0])
        starts, inputs, graph = self._plan(encoding, denoising, own)
        device = self.network.device
        hidden, flags = self._step(inputs.to(device)) if graph is None else graph(inputs, device)
        stands = flags.tolist()  # the host waits here
        sound = stands[len(inputs.places) :]

        failed: list[tuple[Row, DGemmaError]] = []
        for work, start in zip(encoding, starts, strict=False):
            if all(sound[start : start + work.encode]):
                table_of(work.row).advance(work.row.history, work.encode)
            else:
                failed.append((work.row, not_numbers()))
        broken = {id(row) for row, _ in failed}
        for number, (one, start) in enumerate(zip(denoising, starts[len(encoding) :], strict=True)):
            row, canvas = one.work.row, one.canvas
            if id(row) in broken:
                continue
            before = len(row.tokens)
            try:
                if number < own:
                    self._follow(one, stands[number])
                else:
                    row.settle(*self._believe(row, canvas, hidden[None, start : start + one.work.denoised]))
            except DGemmaError as error:
                failed.append((row, error))
            one.work.given = len(row.tokens) - before
        last = [(work, hidden[start + work.encode - 1]) for work, start in zip(encoding, starts, strict=False)]
        self._next_tokens([(work, own) for work, own in last if is_next(work) and id(work.row) not in broken], failed)
        return failed

    def _follow(self, seated: Seated, stands: int) -> None:
        """Tells a row what its canvas's step on the board brought."""
        (work, canvas, place), watched = seated, False
        if stands == BROKEN:
            raise not_numbers()
        canvas.number += 1
        watched = work.row.request.drafts or work.row.request.params.early_text != "off"
        if not watched and stands != OVER:
            work.row.steps_per_canvas[-1] = canvas.number
            return
        work.row.follow(self.board.step_of(place, canvas, whole=watched), stands == OVER)
        if work.row.canvas is canvas and watched:
            self.board.pin(place, canvas.pins[0])

    def _seat(self, works: Sequence[Work]) -> list[Seated]:
        """A place on the board for each canvas that is denoised. One whose place was given away begins again, to the
        same end.
        """
        seats = {id(canvas): place for place, canvas in enumerate(self._seats) if canvas is not None}
        for work in works:
            canvas = work.row.canvas
            if canvas is not None and canvas.number and id(canvas) not in seats and Board.takes(canvas):
                work.row.restart()
        wanted = [(work, work.row.look()) for work in works]
        here = {id(canvas) for _, canvas in wanted}
        self._seats = [canvas if id(canvas) in here else None for canvas in self._seats]
        found = []
        for work, canvas in wanted:
            place = seats.get(id(canvas))
            if place is None:
                place = self._seats.index(None)
                self._seats[place] = canvas
                self.board.begin(place, canvas, work.row.request.seed)
            work.denoised = canvas.tokens.shape[1]
            found.append(Seated(work, canvas, place))
        return found

    def _plan(self, encoding: Sequence[Work], denoising: Sequence[Seated], own: int) -> Planned:
        """Lays a step out, or finds that it is laid out as the last one was: the same canvases, and no more."""
        same = own, [(one.canvas, one.place, table_of(one.work.row)) for one in denoising]
        if encoding or self._last is None or self._last[0] != same:
            self._last = None if encoding else (same, self._planned(encoding, denoising, own))
        return self._planned(encoding, denoising, own) if self._last is None else self._last[1]

    def _planned(self, encoding: Sequence[Work], denoising: Sequence[Seated], own: int) -> Planned:
        """Lays a step out.

        Where every segment fits a canvas, each gets as many rows as the longest, and their numbers are filled up to
        some that a graph is made for. Else, beside a prompt's long chunk, each has as many rows as tokens.
        """
        segments = [encoding_of(work) for work in encoding]
        segments += [
            Segment(table_of(o.work.row), len(o.work.row.history), o.work.denoised, Mode.DENOISE) for o in denoising
        ]
        longest, encoded = max(segment.length for segment in segments), len(encoding)
        if longest > self.board.length:
            spans = [segment.length for segment in segments]
            fresh = [token for work in encoding for token in fresh_of(work)]
            starts, width = _begins(spans), max([o.work.denoised for o in denoising], default=0)
            layout = self._layout(segments)
            return Planned(starts, self._inputs(layout, fresh, starts[encoded:], denoising, own, own, width), None)

        pitch = min(self.board.length, 1 << (longest - 1).bit_length())
        count, more, sampled = _size(encoded), _size(len(denoising)), _size(own)
        fill = Segment(self._nobody, 0, pitch, Mode.DENOISE)
        segments[encoded:encoded] = [fill] * (count - encoded)
        segments += [fill] * (count + more - len(segments))
        fresh = [token for work in encoding for token in [*fresh_of(work), *[0] * (pitch - work.encode)]]
        fresh += [0] * (pitch * (count - encoded))
        layout = self._layout(segments, pitch=pitch, encoded=count * pitch)
        starts = [*range(0, pitch * encoded, pitch), *range(pitch * count, pitch * (count + more), pitch)]
        inputs = self._inputs(layout, fresh, starts[encoded:], denoising, own, sampled, pitch)
        key = (count, more, sampled, pitch, *layout.splits)
        graph = self._graphs.setdefault(key, Graph(self._step, self._pool))
        return Planned(starts[: encoded + len(denoising)], inputs, graph)

    def _layout(self, segments: Sequence[Segment], *, pitch: int | None = None, encoded: int | None = None) -> Layout:
        columns = self._columns if pitch else 1
        layout = lay_out(
            segments, self.network.config, self.store.size,
            pitch=pitch, columns=columns, size=self.network.dtype.itemsize,
        )  # fmt: skip
        return layout if encoded is None else replace(layout, encoded=encoded)

    def _inputs(
        self,
        layout: Layout,
        fresh: list[int],
        starts: Sequence[int],
        denoising: Sequence[Seated],
        own: int,
        sampled: int,
        width: int,
    ) -> Inputs:
        """The first `own` canvases are sampled on the board, filled up to `sampled`: a place given twice changes
        nothing. `starts`: the rows where the canvases begin, with fill where there is some.
        """
        length, spots = self.board.length, []
        ends = [*starts, len(layout.positions)][1:]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            place = denoising[min(number, len(denoising) - 1)].place
            spots += [place * length + min(spot, length - 1) for spot in range(end - start)]
        chosen = [*range(own), *[0] * (sampled - own)]
        rows = [starts[n] + min(spot, denoising[n].work.denoised - 1) for n in chosen for spot in range(width)]
        places = [denoising[n].place for n in chosen]
        return Inputs(layout, *(torch.tensor(values, dtype=torch.int64) for values in (fresh, spots, rows, places)))

    def _step(self, inputs: Inputs) -> Outputs:
        """Everything that the card does in a step."""
        board, fused, encoded, sampled = self.board, self.fused, inputs.layout.encoded, len(inputs.places)
        x = fused.begin(inputs.tokens, inputs.spots, board.tokens, board.soft)
        hidden = fused.run(x, inputs.layout)
        flags = torch.empty(sampled + encoded, dtype=torch.uint8, device=hidden.device)
        if sampled:
            board.settle(hidden[inputs.rows], inputs.places, flags[:sampled])
        layer.sound(hidden[:encoded], flags[sampled:])
        return Outputs(hidden, flags)

    def _next_tokens(self, rows: list[tuple[Work, Tensor]], failed: list[tuple[Row, DGemmaError]]) -> None:
        """Draws on the card, all at once; requests that want more of their scores as on a CPU."""
        plain = [(work, hidden) for work, hidden in rows if _draws_plainly(work.row)]
        super()._next_tokens([(work, hidden) for work, hidden in rows if not _draws_plainly(work.row)], failed)
        if not plain:
            return
        own = [work.row for work, _ in plain]
        tokens = self.board.next_tokens(
            torch.stack([hidden for _, hidden in plain]),
            [row.request.seed for row in own],
            [len(row.tokens) for row in own],
            [row.request.params.temperature for row in own],
        )
        for (work, _), token in zip(plain, tokens, strict=True):
            before = len(work.row.tokens)
            if token < 0:
                failed.append((work.row, not_numbers()))
            else:
                work.row.append(token, [])
            work.given = len(work.row.tokens) - before


def _draws_plainly(row: Row) -> bool:
    params = row.request.params
    likely = params.top_k or params.top_p < 1 or params.min_p > 0
    return not likely and not params.logit_bias and params.logprobs is None and len(row.tokens) >= params.min_tokens


def _begins(lengths: Sequence[int]) -> list[int]:
    """Where parts of some lengths begin, one after another."""
    return [sum(lengths[:number]) for number in range(len(lengths))]


def _size(count: int) -> int:
    """The least number of segments that graphs are made for and that holds so many; 0 for none."""
    return next((size for size in (0, *SIZES) if size >= count), count)
