"""Many requests, step by step: who is in the batch, and what one step does."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

import torch

from ..devices import current
from ..errors import CapacityError, ConfigError, Draining, QueueFull
from ..kernels.gpu import missing
from ..memory import peak_memory_bytes
from ..model import Network
from ..text import Tokenizer
from .forward import Forward, Work
from .pages import Pages
from .room import keep_experts, plan_cache
from .row import Request, Row
from .settings import EngineSettings, Status
from .ticket import Ticket

log = logging.getLogger(__name__)


class Engine:
    """Runs requests together: they join and leave between steps, each at its own place of its own canvas.

    Whoever iterates over a ticket drives the engine for all; `start` gives that to a thread of its own.

    Args:
        room: pages of full and of sliding layers; None: as the settings and the memory have it.

    Raises:
        CapacityError: the cache would not hold one request of the greatest length.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer | None,
        settings: EngineSettings | None = None,
        *,
        room: tuple[int, int] | None = None,
    ):
        self.network, self.tokenizer = network, tokenizer
        self.settings = settings = settings or EngineSettings()
        context = network.config.max_position_embeddings
        self.limit = min(settings.max_model_len or context, context)
        self.pages = plan_cache(network, settings, self.limit, room)
        with current(network.device):
            self._forward = _forward(network, self.pages, settings, self.limit)
        keep_experts(network, settings)
        self._news: list[Row | Ticket] = []  # submitted, and cancelled, since the last step
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._lock = threading.Lock()  # a step
        self._queue = threading.Condition()  # what changes between steps
        self._thread: threading.Thread | None = None
        self._draining = self._closed = False
        self._most = settings.max_batch  # requests in a step at present; fewer after a step has failed
        self._batch = self._steps = self._forwards = self._tokens = 0
        self._prompt_tokens = self._reused_tokens = self._preemptions = 0

    def submit(self, request: Request) -> Ticket:
        """Puts a request in line.

        Raises:
            QueueFull: too many wait.
            Draining: no new requests are taken.
            CapacityError: the cache could not hold it even alone.
        """
        need = len(request.prompt) + request.settings.max_new_tokens
        if -(-need // self.pages.size) > self.pages.full.size:
            raise CapacityError(
                f"prompt: {len(request.prompt)} tokens and max_new_tokens {request.settings.max_new_tokens} exceed the "
                f"cache of {self.pages.full.size * self.pages.size} tokens"
            )
        ticket = Ticket(
            prompt_tokens=len(request.prompt),
            seed=request.seed,
            drive=self._drive,
            ensure_thread=self.start,
            cancel=self._cancel,
        )
        row = Row(request, ticket, self.tokenizer, self.network.config.vocab_size)
        with self._queue:
            if self._draining or self._closed:
                raise Draining("the engine is shutting down and takes no new requests")
            if self._queued + len(self._running) >= self.settings.max_queue + self.settings.max_batch:
                raise QueueFull(f"{self._queued} requests are waiting; try again in a moment")
            self._news.append(row)
            self._prompt_tokens += len(request.prompt)
            self._queue.notify_all()
        return ticket

    def start(self) -> None:
        """Gives the driving to a thread of the engine's own; a second call changes nothing."""
        with self._queue:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="dgemma-engine", daemon=True)
                self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Takes no new requests, and waits so long for those that are here; returns whether all are done."""
        self.start()
        with self._queue:
            self._draining = True
            return self._queue.wait_for(lambda: not self._queued and not self._running, timeout=seconds)

    def close(self) -> None:
        """Ends every request and the thread."""
        with self._queue:
            self._closed = True
            self._queue.notify_all()
        if self._thread is not None:
            self._thread.join()
        with self._lock, self._queue:
            new = [row for row in self._news if isinstance(row, Row)]
            for row in [*self._running, *self._waiting, *new]:
                row.leave()
                row.ticket.fail(Draining("the engine was closed"))
            self._running.clear()
            self._waiting.clear()
            self._news.clear()

    def status(self) -> Status:
        """The engine's figures now."""
        pool = self.pages.full
        return Status(
            queued=self._queued,
            running=len(self._running),
            batch=self._batch,
            steps=self._steps,
            forwards=self._forwards,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused_tokens,
            preemptions=self._preemptions,
            pages_used=pool.size - pool.available,
            pages=pool.size,
            draining=self._draining,
        )

    def step(self) -> bool:
        """One forward of everything that can move; False when there is nothing to do.

        After an error all are in line again, and the next step is made with half as many of them.
        """
        with self._lock:
            works: list[Work] = []
            started = time.perf_counter()
            try:
                self._admit()
                works = self._plan()
                if not works:
                    return False
                started = time.perf_counter()
                with current(self.network.device):
                    failed = self._forward.run(works)
            except BaseException:
                # Nobody knows how far it came: all canvases of the batch are drawn again from their beginning.
                self._account(works, time.perf_counter() - started)
                self._most = max(1, len(self._running) // 2)
                for row in self._running:
                    row.restart()
                for row in (*self._running, *self._waiting):
                    row.leave()
                self._finish([row for row in self._running if row.done])
                with self._queue:
                    self._waiting.extendleft(reversed(self._running))
                    self._running.clear()
                raise
            self._account(works, time.perf_counter() - started)
            for row, error in failed:
                row.ticket.fail(error)
                self._leave(row)
            self._finish([work.row for work in works if work.row.done and work.row in self._running])
            return True

    def _drive(self) -> bool:
        if self._thread is not None:
            return False
        self._try_step()
        return True

    @property
    def _queued(self) -> int:
        """Requests in line."""
        return len(self._waiting) + sum(isinstance(one, Row) for one in self._news)

    def _cancel(self, ticket: Ticket) -> None:
        with self._queue:
            self._news.append(ticket)
            self._queue.notify_all()

    def _run(self) -> None:
        while True:
            with self._queue:
                self._queue.wait_for(lambda: self._news or self._waiting or self._running or self._closed)
                if self._closed:
                    return
            self._try_step()

    def _try_step(self) -> None:
        """A step that may fail as a whole. Who is alone in one that fails is the reason; else fewer try again."""
        try:
            self.step()
        except Exception as error:
            with self._lock, self._queue:
                if self._batch == 1 and self._waiting:
                    row = self._waiting.popleft()
                    row.ticket.fail(error)
                    self._most += 1
                    self._queue.notify_all()
                else:
                    log.warning("a step of %d requests failed; half as many go on", self._batch, exc_info=True)

    def _admit(self) -> None:
        """Takes what is new, drops who was cancelled, lets in who waited longest while there is room."""
        with self._queue:
            news, self._news = self._heard(self._news), []
            self._waiting.extend(row for row in news if isinstance(row, Row))
            cancelled = {id(ticket) for ticket in news if isinstance(ticket, Ticket)}
            if cancelled:
                self._waiting = deque(row for row in self._waiting if id(row.ticket) not in cancelled)
                self._queue.notify_all()
        for row in [row for row in self._running if id(row.ticket) in cancelled]:
            self._leave(row)
        while self._waiting and len(self._running) < self._most:
            row = self._waiting[0]
            reused = row.enter(self.pages, reuse=self.settings.prefix_reuse)
            assert row.table is not None
            # Room for all that it has, so that it is not put back at once; alone it always gets in.
            if self._running and not row.table.fits(min(row.pending + row.request.canvas, self.settings.step_tokens)):
                row.leave()
                return
            if not row.entered:
                row.entered, row.reused = True, reused
                self._reused_tokens += reused
            with self._queue:
                self._waiting.popleft()
                self._running.append(row)

    def _heard(self, news: list[Row | Ticket]) -> list[Row | Ticket]:
        """What is new for this step, in its order."""
        return news

    def _finish(self, rows: Sequence[Row]) -> None:
        for row in rows:
            try:
                row.finish(_peak(self.network))
            except Exception as error:  # whatever it is, the request has ended, and must not be tried for ever
                row.ticket.fail(error)
            self._leave(row)

    def _leave(self, row: Row) -> None:
        row.leave()
        self._most = min(self._most + 1, self.settings.max_batch)
        with self._queue:
            self._running.remove(row)
            self._queue.notify_all()

    def _plan(self) -> list[Work]:
        """What each request does in this step, with pages for it; puts the newest back while pages are missing."""
        works: list[Work] = []
        prompts = sum(row.pending > row.request.canvas for row in self._running)
        share = max(1, self.settings.step_tokens // max(1, prompts))
        for row in list(self._running):
            if row not in self._running:
                continue  # put back for the sake of an older one
            encode = row.pending if row.pending <= row.request.canvas else min(row.pending, share)
            if not self._make_room(row, encode):
                continue
            works.append(Work(row=row, encode=encode, denoise=row.diffusion and encode == row.pending))
        return [work for work in works if work.row in self._running]

    def _make_room(self, row: Row, tokens: int) -> bool:
        """Reserves pages for a running request, at the cost of those that came after it; False if it is put back."""
        table = row.table
        assert table is not None
        while not table.fits(tokens):
            newest = self._running[-1]
            self._put_back(newest)
            if newest is row:
                return False
        self._forward.clear(table, tokens)
        return True

    def _put_back(self, row: Row) -> None:
        row.leave()
        self._preemptions += 1
        with self._queue:
            self._running.remove(row)
            self._waiting.appendleft(row)

    def _account(self, works: Sequence[Work], seconds: float) -> None:
        """Each request's share of the time: what a forward both encoded and denoised is divided by tokens."""
        self._batch, self._steps = len(works), self._steps + 1
        for work in works:
            encoding = seconds * work.encode / max(1, work.encode + work.denoised)
            work.row.spend(seconds, encoding, work.encode)
            self._forwards += work.denoise
            self._tokens += work.given


def _forward(network: Network, pages: Pages, settings: EngineSettings, limit: int) -> Forward:
    """What does the steps: kernels for a GPU, or torch.

    Raises:
        ConfigError: "triton" is wanted, and cannot be had.
    """
    if settings.kernels == "torch" or (settings.kernels == "auto" and network.device.type != "cuda"):
        return Forward(network, pages)
    lack = missing(network)
    if lack is None:
        from .card import CardForward  # loads Triton

        return CardForward(network, pages, canvases=settings.max_batch, limit=limit)
    if settings.kernels == "triton":
        raise ConfigError(f"kernels: 'triton' cannot be had: {lack}")
    log.warning("no kernels for this GPU, the slower way of torch is taken: %s", lack)
    return Forward(network, pages)


def _peak(network: Network) -> int:
    device = network.device
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
