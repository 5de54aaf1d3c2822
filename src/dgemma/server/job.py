"""One HTTP request's answers under way: several tickets, one stream of events, one deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import DGemmaError
from ..events import Delta, Draft, Event, Finish, Result
from ..protocol.errors import from_engine, unavailable
from .errors import timed_out
from .logs import Record

if TYPE_CHECKING:
    from ..engine import Ticket

MOST_DRAFTS = 64  # that wait for a slow reader, an answer; older ones are dropped, text never is


class Job:
    """The tickets of one HTTP request.

    Fields:
        tickets: one a choice, in order.
        prompt_tokens: of the request, each prompt counted once.
        results: those that are there, by choice.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        *,
        prompt_tokens: int,
        names: Mapping[str, str],
        record: Record,
        seconds: float | None,
        on_finish: Callable[[Result], None],
        on_close: Callable[[Job], None],
    ):
        self.tickets, self.prompt_tokens, self.results = tickets, prompt_tokens, dict[int, Result]()
        self._names, self._record, self._seconds = names, record, seconds
        self._on_finish, self._on_close = on_finish, on_close
        self._waiting: deque[tuple[int, Event | Exception | None]] = deque()
        self._news = asyncio.Event()
        self._drafts = [0] * len(tickets)
        self._pumps: list[asyncio.Task[None]] = []
        record.prompt_tokens = prompt_tokens

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) as they come, until every choice has its `Finish`.

        Raises:
            ApiError: an answer failed, took too long, or was cut off by the server's end.
            Exception: the engine failed, by a fault of its own.
        """
        self._pumps = [asyncio.create_task(self._pump(index)) for index in range(len(self.tickets))]
        while len(self.results) < len(self.tickets):
            index, item = await self._next()
            if isinstance(item, DGemmaError):
                raise from_engine(item, self._names, running=True) from item
            if isinstance(item, Exception):
                raise item
            if item is None:
                raise unavailable("the server is shutting down; the answer was cut off", "draining")
            self._note(index, item)
            yield index, item

    def cancel(self) -> None:
        """Frees every choice's place in the engine; the events end soon after, without a `Finish`."""
        for ticket in self.tickets:
            ticket.cancel()

    def close(self) -> None:
        """Cancels what still runs. Whoever has a job closes it."""
        self.cancel()
        for pump in self._pumps:
            pump.cancel()
        self._on_close(self)

    async def collect(self) -> list[Result]:
        """Every choice's result, in order. Errors are those of `events`."""
        async for _ in self.events():
            pass
        return self.ordered()

    def ordered(self) -> list[Result]:
        """Every choice's result, in order, once all are there."""
        return [self.results[index] for index in range(len(self.tickets))]

    async def _pump(self, index: int) -> None:
        """Takes a ticket's events as they come, so that a slow reader holds up nobody."""
        end: Exception | None = None
        try:
            async for event in self.tickets[index]:
                self._put(index, event)
                if isinstance(event, Finish):
                    return
        except Exception as error:
            end = error
        self._put(index, end)

    def _put(self, index: int, item: Event | Exception | None) -> None:
        if isinstance(item, Draft):
            self._drafts[index] += 1
            if self._drafts[index] > MOST_DRAFTS:
                oldest = next(at for at, (one, event) in enumerate(self._waiting) if one == index and _is_draft(event))
                del self._waiting[oldest]
                self._drafts[index] -= 1
        self._waiting.append((index, item))
        self._news.set()

    async def _next(self) -> tuple[int, Event | Exception | None]:
        limit = self._seconds
        left = None if limit is None else limit - self._record.seconds
        try:
            async with asyncio.timeout(left):
                while not self._waiting:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            left = 0.0
        if limit is not None and left is not None and left <= 0:
            raise timed_out(limit)
        index, item = self._waiting.popleft()
        self._drafts[index] -= _is_draft(item)
        return index, item

    def _note(self, index: int, event: Event) -> None:
        record = self._record
        if isinstance(event, Delta):
            record.completion_tokens += len(event.tokens)
            if record.first_text_seconds is None and (event.text or event.thoughts or event.tool_calls):
                record.first_text_seconds = time.perf_counter() - record.started
        elif isinstance(event, Finish):
            self.results[index] = event.result
            record.steps += sum(event.result.stats.steps_per_canvas)
            record.finish_reason = event.result.finish_reason
            self._on_finish(event.result)


def _is_draft(item: object) -> bool:
    return isinstance(item, Draft)
