"""A ticket by itself, then many at once: threads that drive each other's requests, event loops, an engine's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dgemma.engine import Engine, Request, Ticket
from dgemma.errors import RequestError
from dgemma.events import Commit, Event, Finish, Result, Stats
from engines import alone, ask, attribute, engine_of, mix
from tiny import SPECS, Lab

WAIT = 60.0  # seconds; only a test that fails waits so long


def commit(token: int) -> Commit:
    return Commit(canvas=0, steps=1, tokens=[token], text="")


FINISH = Finish(result=Result(text="", tokens=[], finish_reason="stop", seed=0, stats=Stats()))


class Desk:
    """A ticket without an engine; `script` is what each step of driving does."""

    def __init__(self, script: list[Callable[[Ticket], None]] | None = None):
        self.script, self.driven, self.started = script, 0, 0
        self.cancelled: list[Ticket] = []
        self.ticket = Ticket(
            prompt_tokens=3, seed=4, drive=self.drive, ensure_thread=self.start, cancel=self.cancelled.append
        )

    def drive(self) -> bool:
        if self.script is None:
            return False
        self.script[self.driven](self.ticket)
        self.driven += 1
        return True

    def start(self) -> None:
        self.started += 1


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts work in a thread; the function that comes back waits for it and gives its result or raises its error."""
    done: list[Any] = []

    def body() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(WAIT)
        assert done, "the thread hangs"
        if done[0][1] is not None:
            raise done[0][1]
        return done[0][0]

    return wait


def test_whoever_iterates_drives() -> None:
    desk = Desk([lambda t: t.put(commit(1)), lambda t: None, lambda t: (t.put(commit(2)), t.put(FINISH))[0]])
    assert not desk.ticket.closed
    assert list(desk.ticket) == [commit(1), commit(2), FINISH]
    assert desk.driven == 3 and desk.ticket.closed
    assert list(desk.ticket) == [] and desk.driven == 3
    assert desk.ticket.prompt_tokens == 3 and desk.ticket.seed == 4


def test_nothing_comes_after_the_end() -> None:
    for end in (lambda t: t.put(FINISH), lambda t: t.fail(RequestError("no")), lambda t: t.cancel()):
        desk = Desk()
        end(desk.ticket)
        desk.ticket.put(commit(1))
        desk.ticket.fail(RequestError("another"))
        try:
            assert commit(1) not in list(desk.ticket)
        except RequestError as error:
            assert str(error) == "no"
        assert list(desk.ticket) == []


def test_an_error_comes_after_the_events_so_far_and_once() -> None:
    desk = Desk()
    desk.ticket.put(commit(1))
    desk.ticket.fail(RequestError("broken"))
    events = iter(desk.ticket)
    assert next(events) == commit(1)
    with pytest.raises(RequestError, match="broken"):
        next(events)
    assert list(desk.ticket) == []


def test_cancelling_is_idempotent_and_forgets() -> None:
    desk = Desk()
    desk.ticket.put(commit(1))
    for _ in range(3):
        desk.ticket.cancel()
    assert desk.cancelled == [desk.ticket]
    assert list(desk.ticket) == []


def test_cancelling_what_is_done_changes_nothing() -> None:
    desk = Desk()
    desk.ticket.put(commit(1))
    desk.ticket.put(FINISH)
    desk.ticket.cancel()
    assert desk.cancelled == [] and list(desk.ticket) == [commit(1), FINISH]
    failed = Desk()
    failed.ticket.fail(RequestError("broken"))
    failed.ticket.cancel()
    assert failed.cancelled == []
    with pytest.raises(RequestError):
        list(failed.ticket)


@pytest.mark.parametrize("end", ["finish", "cancel", "fail"])
def test_a_thread_that_waits_is_woken(end: str) -> None:
    desk = Desk()
    first = threading.Event()

    def read() -> list[Event]:
        events = []
        for event in desk.ticket:
            events.append(event)
            first.set()
        return events

    wait = in_thread(read)
    desk.ticket.put(commit(1))
    assert first.wait(WAIT)
    if end == "finish":
        desk.ticket.put(FINISH)
        assert wait() == [commit(1), FINISH]
    elif end == "cancel":
        desk.ticket.cancel()
        assert wait() == [commit(1)]
    else:
        desk.ticket.fail(RequestError("broken"))
        with pytest.raises(RequestError, match="broken"):
            wait()


@pytest.mark.parametrize("end", ["finish", "cancel", "fail"])
def test_a_task_that_waits_is_woken(end: str) -> None:
    """Events come from another thread; the loop goes on meanwhile."""
    desk = Desk()

    async def read() -> list[Event]:
        events = []
        async for event in desk.ticket:
            events.append(event)
            if len(events) == 1:
                threading.Thread(target=then).start()
        return events

    def then() -> None:
        desk.ticket.put(commit(2))
        {"finish": lambda: desk.ticket.put(FINISH), "cancel": desk.ticket.cancel}.get(
            end, lambda: desk.ticket.fail(RequestError("broken"))
        )()

    async def main() -> list[Event]:
        task = asyncio.create_task(read())
        await asyncio.sleep(0)
        assert not task.done() and desk.started == 1
        desk.ticket.put(commit(1))
        return await asyncio.wait_for(task, WAIT)

    if end == "fail":
        with pytest.raises(RequestError, match="broken"):
            asyncio.run(main())
    else:
        events = asyncio.run(main())
        assert events[0] == commit(1) and (end == "cancel" or events[1:] == [commit(2), FINISH])
    assert desk.ticket._listeners == []


def test_a_task_that_is_cancelled_leaves_nothing_behind() -> None:
    """Nor does a loop that is gone hinder those who still put events."""
    desk = Desk()

    async def main() -> None:
        events = desk.ticket.__aiter__()
        task = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert desk.ticket._listeners == []
    desk.ticket._listeners.append((asyncio.new_event_loop(), asyncio.Event()))
    desk.ticket._listeners[0][0].close()
    desk.ticket.put(FINISH)
    assert list(desk.ticket) == [FINISH]


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network("base")


@pytest.fixture(scope="module")
def requests(network: Any) -> list[Request]:
    every = mix(network, SPECS["base"])
    return [every[index] for index in (0, 3, 5, 6, 8, 11)]


@pytest.fixture(scope="module")
def truth(network: Any, requests: list[Request]) -> list[list[int]]:
    return [result.tokens for result in alone(network, requests)]


def tokens_of(ticket: Ticket) -> list[int]:
    return list(ticket)[-1].result.tokens  # type: ignore[union-attr]


async def atokens_of(ticket: Ticket) -> list[int]:
    events = [event async for event in ticket]
    return events[-1].result.tokens  # type: ignore[union-attr]


def test_threads_without_a_driver(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """Each thread submits and reads its own request; whoever holds the engine moves all."""
    engine, gate = engine_of(network), threading.Barrier(len(requests))

    def one(request: Request) -> list[int]:
        gate.wait(WAIT)
        return tokens_of(engine.submit(request))

    waits = [in_thread(lambda request=request: one(request)) for request in requests]
    assert [wait() for wait in waits] == truth
    assert engine.status().running == engine.status().queued == 0


def test_tasks_threads_and_the_engines_own_thread(
    network: Any, requests: list[Request], truth: list[list[int]]
) -> None:
    """A thread that drives by reading, then tasks that start the engine's thread, then both to the end."""
    engine: Engine = engine_of(network, max_batch=4)
    tickets = [engine.submit(request) for request in requests]
    reader = iter(tickets[1])
    first = next(reader)  # driven from here
    assert engine._thread is None

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(atokens_of(tickets[index]) for index in (0, 2, 3)))

    try:
        waits = [in_thread(lambda index=index: tokens_of(tickets[index])) for index in (4, 5)]
        assert asyncio.run(main()) == [truth[index] for index in (0, 2, 3)]
        assert engine._thread is not None
        assert [wait() for wait in waits] == truth[4:6]
        assert [first, *reader][-1].result.tokens == truth[1]  # type: ignore[union-attr]
    finally:
        engine.close()


def test_starting_while_somebody_drives(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """`start` in the middle of a step that a reader does: it ends its step and reads on."""
    engine = engine_of(network)
    run, inside, go = network.run, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert go.wait(WAIT)
        return run(*arguments)

    tickets = [engine.submit(request) for request in requests[:2]]
    with attribute(network, "run", slow):
        wait = in_thread(lambda: tokens_of(tickets[0]))
        assert inside.wait(WAIT)
        engine.start()
        engine.start()
        go.set()
        assert wait() == truth[0]
    assert tokens_of(tickets[1]) == truth[1]
    engine.close()


def test_one_of_many_readers_gives_up(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """Tasks that are cancelled with their tickets; the others' answers stay the same."""
    engine = engine_of(network)

    async def give_up(ticket: Ticket) -> None:
        async for _ in ticket:
            ticket.cancel()

    async def main() -> list[Any]:
        kept = [engine.submit(request) for request in requests]
        gone = [engine.submit(request) for request in requests]
        gone[0].cancel()
        return await asyncio.gather(*map(atokens_of, kept), *map(give_up, gone))

    try:
        assert asyncio.run(main())[: len(requests)] == truth
        assert engine.drain(WAIT)
    finally:
        engine.close()
    assert engine.status().pages_used == 0


def test_errors_reach_the_right_reader(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """In a thread-driven engine a request that fails alone raises at its own ticket, blocking or not."""
    engine = engine_of(network)
    bad = ask(network, requests[1].prompt, seed=77)
    run = network.run

    def broken(x: Any, view: Any) -> Any:
        hidden = run(x, view)
        rows = [row for row in engine._running if row.request.seed == 77 and row.canvas is not None]
        return hidden * float("nan") if rows and len(engine._running) == 1 else hidden

    tickets = [engine.submit(request) for request in requests[:2]]
    assert [tokens_of(ticket) for ticket in tickets] == truth[:2]
    with attribute(network, "run", broken):
        engine.start()
        with pytest.raises(RequestError, match="not numbers"):
            list(engine.submit(bad))
        with pytest.raises(RequestError, match="not numbers"):
            asyncio.run(atokens_of(engine.submit(bad)))
    assert tokens_of(engine.submit(requests[0])) == truth[0]
    engine.close()
