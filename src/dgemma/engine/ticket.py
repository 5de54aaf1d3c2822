"""A request's end of the line: its events, for a loop that blocks or one that does not."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from ..events import Event, Finish


class Ticket:
    """What `Engine.submit` returns. Iterate over it, blocking or on an event loop, for the events; the last one is a
    `Finish`. A ticket that was cancelled ends without one.

    Args:
        prompt_tokens, seed: of the request.
        drive: does one step of the engine if nobody else drives it; returns False if a thread does.
        ensure_thread: makes a thread drive the engine, for those who cannot block.
        cancel: tells the engine.
    """

    def __init__(
        self,
        *,
        prompt_tokens: int,
        seed: int,
        drive: Callable[[], bool],
        ensure_thread: Callable[[], None],
        cancel: Callable[[Ticket], None],
    ):
        self.prompt_tokens, self.seed = prompt_tokens, seed
        self._drive, self._ensure_thread, self._cancel = drive, ensure_thread, cancel
        self._events: deque[Event] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._on_close: list[Callable[[], None]] = []

    def put(self, event: Event) -> None:
        """The engine has something to say."""
        with self._changed:
            if not self._closed:
                self._events.append(event)
                self._closed = isinstance(event, Finish)
                self._notify()

    def fail(self, error: BaseException) -> None:
        """The request has failed; whoever iterates gets the error after the events so far."""
        with self._changed:
            if not self._closed:
                self._error, self._closed = error, True
                self._notify()

    def cancel(self) -> None:
        """Ends the request, from any thread; it leaves the batch at the next step."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._events.clear()
            self._notify()
        self._cancel(self)

    @property
    def closed(self) -> bool:
        """Whether no more events will come."""
        return self._closed

    def on_close(self, call: Callable[[], None]) -> None:
        """Calls `call` once no more events will come, at once if that is so already.

        It is called from the thread that ends the request, and holds it up: it must be quick.
        """
        with self._changed:
            if not self._closed:
                self._on_close.append(call)
                return
        call()

    def drive(self) -> bool:
        """Does one step of the engine if nobody else drives it; False if a thread does."""
        return self._drive()

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                event = self._next()
                if event is None and self._closed:
                    return
            if event is not None:
                yield event
            elif not self._drive():
                with self._changed:
                    self._changed.wait_for(lambda: self._events or self._closed)

    async def __aiter__(self) -> AsyncIterator[Event]:
        self._ensure_thread()
        listener = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                with self._changed:
                    event = self._next()
                    if event is None and self._closed:
                        return
                    if event is None:
                        listener[1].clear()
                if event is not None:
                    yield event
                else:
                    await listener[1].wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def _next(self) -> Event | None:
        if self._events:
            return self._events.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, event in self._listeners:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)
        if self._closed:
            for call in self._on_close:
                call()
            self._on_close.clear()
