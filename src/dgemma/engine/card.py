"""A step on a GPU: one forward and all sampling in one go, replayed as a CUDA graph where its shape has come before.

The host says what is where, starts a step, and hears a byte of each canvas when it is done. Canvases stay on the card
(`board.py`) until they are over. Requests that want more of their scores than the card's sampler does (top-k, top-p,
min-p, biases, log-probabilities) are sampled as on a CPU, from the same forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion import Canvas
from ..diffusion.canvas import not_numbers
from ..errors import DGemmaError
from ..kernels.triton import layer
from ..kernels.triton.settle import BROKEN, OVER
from ..model import Network
from .board import Board
from .forward import Forward, Work, is_next, table_of
from .fused import Fused
from .inputs import Inputs, Key, Parcel, Planner, Seated
from .pages import Pages
from .row import Row


class Outputs(NamedTuple):
    """What a step gives.

    Fields:
        hidden: [T, H].
        told: uint8 [8 * N + M + E], all that the host waits for: tokens drawn as int64, -1 where there is none to draw;
            how the canvases stand; which encoded rows are sound (1: all of them numbers).
    """

    hidden: Tensor
    told: Tensor


class Graph:
    """A step of one shape. The first call does it and prepares what is compiled and tuned at first use; the second one
    records it; from then on it is one launch.

    Args:
        compute: the step.
        inputs: of that shape.
        pool: memory that graphs share, since no two run at once; None: nothing is recorded.
    """

    def __init__(self, compute: Callable[[Inputs], Outputs], inputs: Inputs, device: torch.device, pool: Any):
        self._compute, self._pool = compute, pool
        self.parcel = Parcel(inputs, device)
        self._prepared = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs | None = None

    def __call__(self) -> Outputs:
        """Does the step with the inputs that were sent last. The outputs are overwritten by the next one."""
        if self._pool is None or not self._prepared:
            outputs = self._compute(self.parcel.there)
            self._prepared = True
            return outputs
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, a server's or NCCL's, is none of the graph's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._outputs = self._compute(self.parcel.there)
            self._graph = graph
        self._graph.replay()
        assert self._outputs is not None
        return self._outputs

    def hear(self, told: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Waits for what a step tells: tokens, how the canvases stand, which rows are sound."""
        inputs = self.parcel.there
        drawn, sampled, told = 8 * len(inputs.lasts), len(inputs.places), told.cpu()
        tokens, stands, sound = told[:drawn], told[drawn : drawn + sampled], told[drawn + sampled :]
        return tokens.view(torch.int64).tolist(), stands.tolist(), sound.tolist()


class Sent(NamedTuple):
    """A step that was sent.

    Fields:
        following: what the next one is if it is laid out as this one; None where it cannot be.
        starts, key: see `Planned`.
        graph: what does it.
    """

    following: object
    starts: list[int]
    key: Key | None
    graph: Graph


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
        self.planner = Planner(
            network.config, pages, length=self.board.length, limit=limit, size=network.dtype.itemsize
        )
        self._graphs: dict[Key, Graph] = {}
        self._pool = torch.cuda.graph_pool_handle() if network.device.type == "cuda" else None
        self._last: Sent | None = None

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[tuple[Row, DGemmaError]]:
        encoding = [work for work in works if work.encode]
        seated = [(one, self.board.takes(one.canvas)) for one in self._seat([work for work in works if work.denoise])]
        denoising = [one for one, taken in seated if taken] + [one for one, taken in seated if not taken]
        own = sum(taken for _, taken in seated)
        for work, canvas, place in denoising[own:]:
            self.board.put(place, canvas.tokens[0], None if work.row.soft is None else work.row.soft[0])
        draws = [self._draws(work) for work in encoding]
        starts, graph = self._sent(encoding, denoising, own, draws=draws)
        hidden, told = graph()
        tokens, stands, sound = graph.hear(told)  # the host waits here

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
        asking = []
        for number, (work, start) in enumerate(zip(encoding, starts, strict=False)):
            if id(work.row) in broken or not is_next(work):
                continue
            if draws[number]:
                self._append(work, tokens[number], failed)
            else:
                asking.append((work, hidden[start + work.encode - 1]))
        self._next_tokens(asking, failed)
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
            if canvas is not None and canvas.number and id(canvas) not in seats and self.board.takes(canvas):
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

    def _sent(
        self, encoding: Sequence[Work], denoising: Sequence[Seated], own: int, *, draws: Sequence[bool]
    ) -> tuple[list[int], Graph]:
        """Lays a step out and sends it. Gives where each segment's rows begin, and what does the step.

        Where the last one was laid out for the same canvases and no more, nothing is sent. Where there are single
        tokens beside them, and then the next ones of the same requests, only what has moved is written anew, until one
        of them needs a new page.
        """
        seated = own, draws, [(one.canvas, one.place, table_of(one.work.row)) for one in denoising]
        tables = [table_of(work.row) for work in encoding]
        last, self._last = self._last, None  # nobody knows what was sent if this fails
        encoded = [(table, table.length, work.encode) for table, work in zip(tables, encoding, strict=True)]
        if last is None or last.following != (seated, encoded):
            starts, inputs, key = self.planner.plan(encoding, denoising, own, draws=draws)
            last = Sent(None, starts, key, self._graph(inputs, key))
            last.graph.parcel.pack(inputs)
            last.graph.parcel.send()
        elif encoding:
            last.graph.parcel.here.follow(encoding)
            last.graph.parcel.send()
        if last.key is not None and all(n == 1 and (length + 1) % table.pages.size for table, length, n in encoded):
            following = seated, [(table, length + 1, 1) for table, length, _ in encoded]
            self._last = last._replace(following=following)
        return last.starts, last.graph

    def _graph(self, inputs: Inputs, key: Key | None) -> Graph:
        """What does steps of a shape."""
        if key is None:
            return Graph(self._step, inputs, self.network.device, None)
        if key not in self._graphs:
            self._graphs[key] = Graph(self._step, inputs, self.network.device, self._pool)
        return self._graphs[key]

    def _step(self, inputs: Inputs) -> Outputs:
        """Everything that the card does in a step."""
        board, fused, encoded, sampled = self.board, self.fused, inputs.layout.encoded, len(inputs.places)
        x = fused.begin(inputs.tokens, inputs.spots, board.tokens, board.soft)
        hidden = fused.run(x, inputs.layout)
        drawn = 8 * len(inputs.lasts)
        told = torch.empty(drawn + sampled + encoded, dtype=torch.uint8, device=hidden.device)
        flags = told[drawn:]
        if drawn:
            board.draw(
                hidden[inputs.lasts], inputs.asked, inputs.levels, told[:drawn].view(torch.int64), likely=inputs.likely
            )
        if sampled:
            board.settle(hidden[inputs.rows], inputs.places, flags[:sampled], likely=inputs.likely)
        layer.sound(hidden[:encoded], flags[sampled:])
        return Outputs(hidden, told)

    def _draws(self, work: Work) -> bool:
        """Whether the step draws a token behind what is encoded."""
        row = work.row
        ready = not row.diffusion and work.encode == row.pending
        return ready and self.board.samples(row.request.params, len(row.tokens))

    def _append(self, work: Work, token: int, failed: list[tuple[Row, DGemmaError]]) -> None:
        """Gives a row the token that was drawn on the card."""
        before = len(work.row.tokens)
        if token < 0:
            failed.append((work.row, not_numbers()))
        else:
            work.row.append(token, [])
        work.given = len(work.row.tokens) - before
