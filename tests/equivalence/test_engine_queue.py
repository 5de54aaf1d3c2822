"""Who gets in, who waits, who is refused, who leaves: queue, memory, draining, closing, cancelling, failing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import dgemma
from dgemma import api
from dgemma.engine import Engine, EngineSettings, Request, Ticket
from dgemma.errors import CapacityError, Draining, QueueFull
from dgemma.events import Draft, Finish
from engines import DEFAULTS, Injected, alone, answers, ask, assert_all_free, attribute, drive, engine_of, words
from tiny import SPECS, Lab

SPEC = SPECS["base"]
WAIT = 60.0  # seconds; only a test that fails waits so long
BAD = 33


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network("base")


@pytest.fixture(scope="module")
def requests(network: Any) -> list[Request]:
    return [ask(network, words(SPEC, 5 + 4 * n, seed=n), seed=n, max_denoising_steps=4) for n in range(6)]


@pytest.fixture(scope="module")
def truth(network: Any, requests: list[Request]) -> list[list[int]]:
    return [result.tokens for result in alone(network, requests)]


def tokens_of(ticket: Ticket) -> list[int]:
    return list(ticket)[-1].result.tokens  # type: ignore[union-attr]


@contextmanager
def closing(engine: Engine) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def halted(network: Any) -> Iterator[Callable[[], None]]:
    """Forwards that wait until the function is called, or to the end of the block."""
    run, go = network.run, threading.Event()

    def wait(*arguments: Any) -> Any:
        assert go.wait(WAIT)
        return run(*arguments)

    with attribute(network, "run", wait):
        try:
            yield go.set
        finally:
            go.set()


def test_a_full_queue_refuses_until_one_is_done(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """One may run and two may wait."""
    engine = engine_of(network, max_batch=1, max_queue=2)
    tickets = [engine.submit(request) for request in requests[:3]]
    for _ in range(2):  # nobody runs, then one does
        with pytest.raises(QueueFull) as refused:
            engine.submit(requests[3])
        assert isinstance(refused.value, CapacityError) and "\n" not in str(refused.value)
        engine.step()
    assert engine.status().queued == 2 and engine.status().running == 1
    found = [tokens_of(tickets[0])]
    tickets.append(engine.submit(requests[3]))
    tickets[1].cancel()
    engine.step()
    tickets.append(engine.submit(requests[4]))
    with pytest.raises(QueueFull):
        engine.submit(requests[5])
    assert found + [tokens_of(ticket) for ticket in tickets[2:]] == [truth[0], *truth[2:5]]
    # Who was refused is counted nowhere.
    assert engine.status().prompt_tokens == sum(len(request.prompt) for request in requests[:5])


def test_draining(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    with closing(engine_of(network, max_batch=2)) as engine:
        tickets = [engine.submit(request) for request in requests]
        with halted(network) as go:
            assert not engine.drain(0.05)
            assert engine.status().draining
            with pytest.raises(Draining):
                engine.submit(requests[0])
            go()
            assert engine.drain(WAIT)
        assert [tokens_of(ticket) for ticket in tickets] == truth
        assert engine.status().running == engine.status().queued == engine.status().pages_used == 0


def test_draining_does_not_wait_for_who_is_gone(network: Any, requests: list[Request]) -> None:
    """All that waited was cancelled just as the draining began."""
    with closing(engine_of(network)) as engine, engine._lock:  # nobody can step
        ticket = engine.submit(requests[0])
        ticket.cancel()
        done = threading.Event()
        thread = threading.Thread(target=lambda: engine.drain(WAIT) and done.set())
        thread.start()
        while not engine.status().draining:
            thread.join(0.01)
        engine._lock.release()
        try:
            assert done.wait(WAIT / 3)
        finally:
            thread.join()
            engine._lock.acquire()


@pytest.mark.parametrize("started", [True, False])
def test_closing(network: Any, requests: list[Request], started: bool) -> None:
    engine = engine_of(network, max_batch=2)
    tickets = [engine.submit(request) for request in requests[:4]]
    engine.step()
    if started:
        engine.start()
    engine.close()
    engine.close()
    for ticket in tickets:
        if not any(isinstance(event, Finish) for event in ticket._events):
            with pytest.raises(Draining, match="closed"):
                list(ticket)
    assert_all_free(engine)
    with pytest.raises(Draining):
        engine.submit(requests[0])
    engine.start()
    assert engine._thread is None or not engine._thread.is_alive()
    assert engine.status().running == engine.status().queued == 0


def test_cancelling_at_every_moment(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """Before the first step, while it waits, in the middle, when it is done, twice; the next step frees the pages."""
    engine = engine_of(network, max_batch=2, page_size=4)
    tickets = [engine.submit(request) for request in requests]
    tickets[0].cancel()
    engine.step()
    assert engine.status().running == 2 and engine.status().queued == 3
    tickets[5].cancel()  # waits
    used = engine.status().pages_used
    tickets[1].cancel()  # runs
    tickets[1].cancel()
    assert engine.status().running == 2 and engine.status().pages_used == used
    engine.step()
    assert engine.status().running == 2 and engine.status().queued == 1
    assert [tokens_of(tickets[n]) for n in (2, 3, 4)] == truth[2:5]
    tickets[2].cancel()
    assert [list(tickets[n]) for n in (0, 1, 5)] == [[], [], []]
    assert engine.step() is False
    assert engine.status().pages_used == 0
    assert_all_free(engine)


def test_cancelling_from_other_threads(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    with closing(engine_of(network, max_batch=3, page_size=4, cache_tokens=160)) as engine:
        engine.start()
        kept, gone = ([engine.submit(request) for request in requests] for _ in range(2))
        threads = [threading.Thread(target=ticket.cancel) for ticket in [*gone, *gone]]
        for thread in threads:
            thread.start()
        assert [tokens_of(ticket) for ticket in kept] == truth
        assert all(not any(isinstance(event, Finish) for event in ticket) for ticket in gone)
        assert engine.drain(WAIT)
        assert_all_free(engine)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("mode", ["diffusion", "autoregressive"])
def test_what_cannot_fit_is_refused_and_what_fits_runs(network: Any, size: int, mode: str) -> None:
    """To the token, alone and with others who want the same memory."""
    engine = engine_of(network, page_size=size, cache_tokens=48, step_tokens=7)
    prompt, settings = words(SPEC, 30), {"mode": mode, "max_denoising_steps": 2}
    with pytest.raises(CapacityError, match="48 tokens"):
        engine.submit(ask(network, prompt, max_new_tokens=19, **settings))
    exact = ask(network, prompt, max_new_tokens=18, **settings)
    small = ask(network, prompt[:5], max_new_tokens=8, **settings)
    order = [small, exact, small, exact]
    assert [r.tokens for r in answers(engine, order)] == [r.tokens for r in alone(network, order)]
    assert_all_free(engine)


@pytest.mark.parametrize(
    "settings", [{"max_batch": 0}, {"max_queue": True}, {"page_size": 1.5}, {"cache_tokens": 0}, {"step_tokens": -1}]
)
def test_settings_out_of_range_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(dgemma.ConfigError, match=f"^{next(iter(settings))}: "):
        EngineSettings(**settings)


def test_a_cache_of_less_than_a_page_is_refused(network: Any) -> None:
    with pytest.raises(CapacityError, match="cache_tokens: 15"):
        Engine(network, None, EngineSettings(cache_tokens=15, page_size=16))


@pytest.mark.parametrize("memory", [4096, 64])
def test_first_come_first_served(network: Any, requests: list[Request], memory: int) -> None:
    """The order in which requests get their first step is that in which they came, also where memory is short."""
    served: list[int] = []
    asked = [
        ask(
            network,
            requests[n % 6].prompt,
            seed=n,
            drafts=True,
            max_new_tokens=1 + n % 5,
            max_denoising_steps=1 + n % 3,
        )
        for n, request in enumerate((requests * 3)[:14])
    ]

    def look(step: int, tickets: list[Ticket]) -> None:
        for number, ticket in enumerate(tickets):
            if number not in served and any(isinstance(event, Draft) for event in ticket._events):
                served.append(number)

    engine = engine_of(network, max_batch=2, page_size=4, cache_tokens=memory)
    drive(engine, asked, before=look)
    assert served == list(range(14))


def test_memory_that_is_short_is_not_fought_over(network: Any) -> None:
    """Requests that do not fit together are put back now and then, not at every other step."""
    asked = [ask(network, words(SPEC, 30, seed=n), seed=n, max_denoising_steps=4) for n in range(6)]
    engine = engine_of(network, page_size=4, cache_tokens=100)
    drive(engine, asked)
    assert engine.status().preemptions <= 2 * len(asked)
    assert_all_free(engine)


def stumble(network: Any, error: Exception) -> Callable[[torch.Tensor], torch.Tensor]:
    """An `embed` that raises where three `BAD` tokens are in a row."""
    embed = network.embed

    def body(tokens: torch.Tensor) -> torch.Tensor:
        if (tokens.unfold(1, 3, 1) == BAD).all(dim=-1).any() if tokens.shape[1] > 2 else False:
            raise error
        return embed(tokens)

    return body


def test_whose_arrival_breaks_the_steps_fails(network: Any, requests: list[Request], truth: list[list[int]]) -> None:
    """A step that fails as a whole for the sake of a newcomer costs the newcomer, not those who ran well before."""
    bad = ask(network, (5, BAD, BAD, BAD, 6))
    with closing(engine_of(network)) as engine:
        tickets = [engine.submit(request) for request in requests[:3]]
        for _ in range(2):
            engine.step()
        with attribute(network, "embed", stumble(network, Injected("too much"))):
            newcomer = engine.submit(bad)
            later = engine.submit(requests[3])
            engine.start()
            with pytest.raises(Injected, match="too much"):
                list(newcomer)
            assert [tokens_of(ticket) for ticket in [*tickets, later]] == truth[:4]


def test_a_step_that_fails_once_costs_one_request(
    network: Any, requests: list[Request], truth: list[list[int]]
) -> None:
    """A thread-driven engine goes on; at most one reader gets the error, all others their answers."""
    run, calls = network.run, 0

    def once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Injected("once")
        return run(*arguments)

    with closing(engine_of(network)) as engine, attribute(network, "run", once):
        tickets = [engine.submit(request) for request in requests]
        engine.start()
        failed = 0
        for ticket, tokens in zip(tickets, truth, strict=True):
            try:
                assert tokens_of(ticket) == tokens
            except Injected:
                failed += 1
        assert failed <= 1
        assert engine.drain(WAIT)
        assert_all_free(engine)


@pytest.fixture
def model(lab: Lab) -> Iterator[dgemma.Model]:
    with pytest.warns(UserWarning, match="images"):
        model = dgemma.load(
            lab.path("base"), dtype="float32", engine=EngineSettings(max_batch=2, max_queue=3, cache_tokens=512)
        )
    model.network.generation = DEFAULTS
    yield model
    model.close()


def test_a_batch_longer_than_the_queue(model: dgemma.Model) -> None:
    """`generate_batch` takes any number of prompts, whatever the queue holds."""
    params = dgemma.SamplingParams(max_new_tokens=4, max_denoising_steps=2, seed=1)
    results = model.generate_batch([[5, 6, 7 + n] for n in range(10)], params)
    assert [result.tokens for result in results] == [model.generate([5, 6, 7 + n], params).tokens for n in range(10)]


def test_a_task_that_is_cancelled_ends_its_request(model: dgemma.Model) -> None:
    params = dgemma.SamplingParams(max_new_tokens=300, max_denoising_steps=8, seed=1)

    async def main() -> None:
        task = asyncio.create_task(model.agenerate([5, 6, 7], params))
        while not model.status().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert model.drain(WAIT)
    assert model.status().tokens < 300 and model.status().pages_used == 0


def test_first_requests_of_many_threads_meet_one_engine(model: dgemma.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []
    gate = threading.Barrier(4)

    class Slow(Engine):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            made.append(self)
            threading.Event().wait(0.05)

    monkeypatch.setattr(api, "Engine", Slow)

    def first() -> None:
        gate.wait(WAIT)
        model.generate([5, 6, 7], dgemma.SamplingParams(max_new_tokens=1, max_denoising_steps=1))

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(made) == 1
