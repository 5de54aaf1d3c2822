"""Blocks whose workers fall silent, by a clock of the test's own; a block that is answered by itself."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

pytest.importorskip("ray")

from dgemma.batch import blocks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `time.monotonic` says to the shelf."""
    now = [1000.0]
    monkeypatch.setattr(blocks, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    return now


def ask(awaited: Any) -> Any:
    """What it comes to."""
    return asyncio.run(awaited)


def numbers(shelf: blocks.Shelf, patience: float = 60.0) -> list[tuple[int, bool]]:
    """The blocks that are missing, and whether they were begun."""
    return [(number, begun) for number, begun, _ in ask(shelf.missing(patience))[1]]


def test_blocks_of_silent_workers_are_missing(clock: list[float]) -> None:
    shelf = blocks.Shelf()
    for block in (b"0", b"1", b"2", b"3"):
        ask(shelf.put(block))
    assert ask(shelf.begin(0, "a")) is False and ask(shelf.begin(1, "b")) is False and ask(shelf.begin(2, "a")) is False
    clock[0] += 50
    ask(shelf.beat("b"))
    assert ask(shelf.missing(60.0)) == (0.0, [])
    clock[0] += 20  # a has said nothing for 70
    assert ask(shelf.missing(60.0)) == (20.0, [(0, True, b"0"), (2, True, b"2")])
    ask(shelf.drop(0))
    assert numbers(shelf) == [(2, True)]
    assert ask(shelf.begin(2, "b")) is True  # Ray has found another one for it
    assert numbers(shelf) == []
    assert ask(shelf.begin(0, "b")) is None  # nobody wants it any more
    clock[0] += 1000
    assert ask(shelf.missing(60.0))[0] == 1000 and len(numbers(shelf)) == 2


def test_blocks_that_nobody_begins_are_missing_where_somebody_is_idle(clock: list[float]) -> None:
    shelf = blocks.Shelf()
    for _ in range(3):
        ask(shelf.put(b"x"))
    ask(shelf.begin(0, "a"))
    for _ in range(20):
        clock[0] += 10
        ask(shelf.beat("a"))
        assert numbers(shelf) == []  # it has something to do: they wait for it
    ask(shelf.finish(0))  # no answer comes of it
    for _ in range(7):
        assert numbers(shelf) == []
        clock[0] += 10
        ask(shelf.beat("a"))
    assert numbers(shelf) == [(0, False), (1, False), (2, False)]
    ask(shelf.begin(1, "a"))
    assert numbers(shelf) == []


def test_a_worker_that_loads_is_there(clock: list[float]) -> None:
    shelf = blocks.Shelf()
    assert ask(shelf.missing(60.0)) == (0.0, [])  # none has begun: the cluster may have to grow first
    clock[0] += 5000
    ask(shelf.beat("a"))
    clock[0] += 30
    assert ask(shelf.missing(60.0))[0] == 30


def test_one_alone_has_nothing_beside_it() -> None:
    turns, running, seen = blocks.Turns(), [0, 0], []
    lock = threading.Lock()

    def work(alone: bool) -> None:
        for _ in range(20):
            with turns.one(alone=alone):
                with lock:
                    running[alone] += 1
                    seen.append(tuple(running))
                time.sleep(0.001)
                with lock:
                    running[alone] -= 1

    threads = [threading.Thread(target=work, args=(number % 3 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 120 and {both for both in seen if both[1]} == {(0, 1)}
    assert max(both[0] for both in seen) > 1
