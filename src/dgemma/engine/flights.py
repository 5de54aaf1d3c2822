"""Whichever request is done next: many tickets, waited for together."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from ..errors import Draining, QueueFull, RequestError
from ..events import Finish, Result
from .ticket import Ticket

Key = TypeVar("Key")
Job = TypeVar("Job")
Outcome = list[Result] | Exception
RETRY_SECONDS = 0.05  # between two tries at a line that others have filled
KEPT = 4  # times the look-ahead: answers that wait for their turn at most


class _Flight(Generic[Key]):
    def __init__(self, key: Key, tickets: Sequence[Ticket]):
        self.key, self.tickets, self.open = key, tickets, len(tickets)


class Flights(Generic[Key]):
    """Requests under way. Each has one ticket, or several that are wanted together."""

    def __init__(self) -> None:
        self._flying: dict[int, _Flight[Key]] = {}
        self._closed: SimpleQueue[_Flight[Key]] = SimpleQueue()
        self._ready: deque[tuple[Key, Outcome]] = deque()
        self.tickets = 0

    def __len__(self) -> int:
        return len(self._flying) + len(self._ready)

    def submit(self, key: Key, submit: Callable[[], Sequence[Ticket]], *, wait: bool = True) -> bool:
        """Puts a request in line; one that is refused is done at once, with its error.

        While the line is full it waits for room, or with `wait=False` returns False at once.

        Raises:
            Draining: the engine takes no more.
        """
        while True:
            try:
                tickets = submit()
            except QueueFull:
                if not wait:
                    return False
                done = self._wait(RETRY_SECONDS)
                if done is not None:
                    self._ready.append(done)
                elif not self._flying:
                    time.sleep(RETRY_SECONDS)  # others have filled it
                continue
            except Draining:
                raise
            except Exception as error:
                self._ready.append((key, error))
                return True
            break
        flight = _Flight(key, tickets)
        self._flying[id(flight)] = flight
        self.tickets += len(tickets)
        for ticket in tickets:
            ticket.on_close(partial(self._closed.put, flight))
        return True

    def next(self, timeout: float | None = None) -> tuple[Key, Outcome] | None:
        """The next request that is done: its results, or its error. None after so many seconds, or if there is none."""
        return self._ready.popleft() if self._ready else self._wait(timeout)

    def cancel(self) -> None:
        """Ends what is under way."""
        for flight in self._flying.values():
            for ticket in flight.tickets:
                ticket.cancel()
        self._flying.clear()
        self._ready.clear()
        self.tickets = 0

    def _wait(self, timeout: float | None) -> tuple[Key, Outcome] | None:
        end = None if timeout is None else time.monotonic() + timeout
        while self._flying:
            flight = self._next_closed(end)
            if flight is None:
                return None
            flight.open -= 1
            if not flight.open:
                del self._flying[id(flight)]
                self.tickets -= len(flight.tickets)
                return flight.key, _outcome(flight.tickets)
        return None

    def _next_closed(self, end: float | None) -> _Flight[Key] | None:
        """The flight of the next ticket that ends; drives the engine meanwhile where no thread does."""
        waited_for = next(iter(self._flying.values())).tickets[0]
        while True:
            with contextlib.suppress(Empty):
                return self._closed.get_nowait()
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return None
            if not waited_for.drive():
                try:
                    return self._closed.get(timeout=left)
                except Empty:
                    return None


def answers(
    jobs: Iterable[Job], submit: Callable[[Job], Ticket], *, ahead: int, ordered: bool, errors: str
) -> Iterator[Any]:
    """The result of each job in their order; or, if not `ordered`, (number, result) as each is done.

    Args:
        submit: puts one in line.
        ahead: jobs under way at most; as many are taken before the first answer.
        errors: "raise" the first one, or "return" each in its result's place.

    Raises:
        RequestError: `errors` is neither.
        Draining: the engine takes no more.
    """
    if errors not in ("raise", "return"):
        raise RequestError(f"errors: {errors!r} is not one of raise, return")
    return _answers(jobs, submit, ahead, ordered, errors == "raise")


def _answers(
    jobs: Iterable[Job], submit: Callable[[Job], Ticket], ahead: int, ordered: bool, strict: bool
) -> Iterator[Any]:
    flights: Flights[int] = Flights()
    kept: dict[int, Result | Exception] = {}
    turn = 0

    def take() -> Iterator[Any]:
        nonlocal turn
        done = flights.next()
        assert done is not None
        index, outcome = done
        kept[index] = outcome if isinstance(outcome, Exception) else outcome[0]
        if not ordered:
            turn = index
        while turn in kept:
            result = kept.pop(turn)
            if strict and isinstance(result, Exception):
                raise result
            yield result if ordered else (index, result)
            turn += 1

    try:
        for index, job in enumerate(jobs):
            while flights and (len(flights) >= ahead or len(kept) >= KEPT * ahead):
                yield from take()
            flights.submit(index, lambda job=job: [submit(job)])  # type: ignore[misc]
        while flights:
            yield from take()
    finally:
        flights.cancel()


def _outcome(tickets: Sequence[Ticket]) -> Outcome:
    """Results in the order of the tickets, or the first error among them."""
    results: list[Result] = []
    for ticket in tickets:
        try:
            last = deque(ticket, maxlen=1)
        except Draining:
            raise
        except Exception as error:
            return error
        if not last or not isinstance(last[0], Finish):
            return Draining("the request was cancelled")
        results.append(last[0].result)
    return results
