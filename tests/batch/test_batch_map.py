"""`Model.map` and `dgemma.map`: in order or as done, a little ahead, in flat memory."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import FakeModel, answer

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.engine import Flights, Ticket
from dgemma.errors import CapacityError, Draining, RequestError
from dgemma.events import Finish, Result, Stats
from tiny import Lab


def said(prompt: Any, seed: int = 0, **params: Any) -> str:
    return answer(prompt, seed, SamplingParams(**params))


def prompts(count: int) -> list[str]:
    return [f"p{n}" for n in range(count)]


@pytest.mark.parametrize("threaded", [False, True])
def test_results_come_in_order(threaded: bool) -> None:
    model = FakeModel()
    if threaded:
        model.start()
    assert [r.text for r in dgemma.map(prompts(200), model)] == [said(p) for p in prompts(200)]


@pytest.mark.parametrize("threaded", [False, True])
def test_or_as_they_are_done(threaded: bool) -> None:
    model = FakeModel()
    if threaded:
        model.start()
    got = list(dgemma.map(prompts(200), model, ordered=False))
    assert [number for number, _ in got] != list(range(200))
    assert {number: result.text for number, result in got} == {n: said(f"p{n}") for n in range(200)}


def test_prompts_of_every_kind() -> None:
    talk = [{"role": "user", "content": "hi"}]
    own = SamplingParams(seed=9, max_new_tokens=4)
    rows: list[Any] = [
        "text",
        talk,
        ("text", own),
        (talk, None),
        {"prompt": "a", "text": "b"},
        {"question": "q", "prompt": None},
        {"text": "t"},
        {"messages": talk, "id": 3},
    ]
    results = dgemma.map(iter(rows), FakeModel(), SamplingParams(seed=5))
    wanted = ["text", talk, "text", talk, "a", "q", "t", talk]
    seeds = [5, 5, 9, 5, 5, 5, 5, 5]
    budgets = [None, None, 4, None, None, None, None, None]
    expected = [said(p, s, max_new_tokens=b) for p, s, b in zip(wanted, seeds, budgets, strict=True)]
    assert [result.text for result in results] == expected
    assert next(dgemma.map([{"prompt": "a", "x": "b"}], FakeModel(), prompt_column="x")).text == said("b")
    with pytest.raises(RequestError, match=r"prompt_column: a row has no prompt or .* \(it has: y\)"):
        next(dgemma.map([{"y": "b"}], FakeModel()))


def test_an_endless_iterable_is_read_a_little_ahead() -> None:
    model, taken = FakeModel(max_batch=4), 0

    def endless() -> Iterator[str]:
        nonlocal taken
        for n in itertools.count():
            taken += 1
            yield f"p{n}"

    results = dgemma.map(endless(), model)
    for number in range(50):
        assert next(results).text == said(f"p{number}")
        assert taken - number <= 8 + 4 + 1  # two batches are under way, one waits for its turn
    results.close()
    assert not model.waiting  # what was under way is cancelled


def test_one_slow_request_holds_up_few_others() -> None:
    """In order, what is done waits for its turn; so much of it, and no more."""
    model, taken = FakeModel(max_batch=1), []
    model.start = lambda: None  # type: ignore[method-assign]
    slow = model.submit("slow")
    model.waiting.clear()

    def submit(prompt: str, *_: Any, **__: Any) -> Ticket:
        return slow if prompt == "slow" else FakeModel.submit(model, prompt)

    model.submit = submit  # type: ignore[method-assign, assignment]

    def source() -> Iterator[str]:
        for prompt in ["slow", *prompts(100)]:
            taken.append(prompt)
            yield prompt

    def finish() -> None:
        time.sleep(0.3)
        result = Result(text="at last", tokens=[], finish_reason="stop", seed=0, stats=Stats())
        slow.put(Finish(result=result))

    threading.Thread(target=finish).start()
    results = dgemma.map(source(), model)
    assert next(results).text == "at last"
    assert len(taken) <= 12
    assert len(list(results)) == 100


@pytest.mark.parametrize("ordered", [True, False])
def test_errors_end_it_in_their_turn_or_stand_in_the_results_place(ordered: bool) -> None:
    asked = [*prompts(5), "TOOLONG", *prompts(3), "NAN", "p9"]
    got = list(dgemma.map(asked, FakeModel(), ordered=ordered, errors="return"))
    results = got if ordered else [result for _, result in sorted(got, key=lambda one: one[0])]
    assert isinstance(results[5], CapacityError) and isinstance(results[9], RequestError)
    assert [r.text for n, r in enumerate(results) if n not in (5, 9)] == [
        said(p) for p in asked if p not in ("TOOLONG", "NAN")
    ]
    if ordered:
        before: list[Any] = []
        with pytest.raises(CapacityError):
            before.extend(dgemma.map(asked, FakeModel()))
        one_by_one = dgemma.map(asked, FakeModel())
        assert [next(one_by_one).text for _ in range(5)] == [said(p) for p in prompts(5)]
        with pytest.raises(CapacityError):
            next(one_by_one)
    with pytest.raises(RequestError, match="errors: 'skip' is not one of raise, return"):
        dgemma.map(asked, FakeModel(), errors="skip")


def test_many_refusals_do_not_pile_up() -> None:
    model, taken = FakeModel(max_batch=2), 0

    def source() -> Iterator[str]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield "TOOLONG"

    results = dgemma.map(source(), model, errors="return", ordered=False)
    assert isinstance(next(results)[1], CapacityError) and taken <= 6
    assert len(list(results)) == 999


def test_the_engines_end_ends_it() -> None:
    model = FakeModel()
    model.closes_after = 20
    with pytest.raises(Draining):
        list(dgemma.map(prompts(100), model, errors="return"))


def test_flights_of_several_tickets_are_done_together() -> None:
    rng, flights = random.Random(0), Flights[int]()
    model = FakeModel(max_batch=3)
    for key in range(10):
        flights.submit(key, lambda key=key: [model.submit(f"{key}.{n}") for n in range(1 + key % 4)])  # type: ignore[misc]
    assert len(flights) == 10 and flights.tickets == sum(1 + key % 4 for key in range(10))
    done = {}
    while len(flights):
        key, results = flights.next(rng.choice([None, 5.0])) or pytest.fail("there are more")
        assert not isinstance(results, Exception)
        done[key] = [result.text for result in results]
    assert done == {key: [said(f"{key}.{n}") for n in range(1 + key % 4)] for key in range(10)}
    assert flights.next(0.0) is None and flights.tickets == 0


def test_flights_wait_no_longer_than_told_and_for_room() -> None:
    model = FakeModel(max_batch=1, max_queue=1, delay=0.05)
    flights = Flights[int]()
    model.start()
    for key in range(5):
        flights.submit(key, lambda: [model.submit("x")])
    assert model.most == 2
    while flights.next(10.0):
        pass
    idle = FakeModel()
    idle.thread = threading.Thread()  # which never starts
    flights.submit(9, lambda: [idle.submit("y")])
    started = time.monotonic()
    assert flights.next(0.1) is None and 0.09 < time.monotonic() - started < 2
    flights.cancel()
    assert not len(flights)


@pytest.mark.filterwarnings("default::dgemma.checkpoint.VisionIgnored")
@pytest.mark.parametrize("threaded", [False, True])
def test_on_the_real_engine_it_is_what_each_request_gets_alone(lab: Lab, threaded: bool) -> None:
    rng = random.Random(1)
    lengths = [(rng.randrange(1, 30), rng.randrange(1, 20)) for _ in range(7)]
    asked = [
        (
            [rng.randrange(3, 60) for _ in range(prompt)],
            SamplingParams(seed=n, max_new_tokens=most, max_denoising_steps=4),
        )
        for n, (prompt, most) in enumerate(lengths)
    ]
    model = dgemma.load(lab.path("base"), engine=EngineSettings(max_batch=3))
    alone = [model.generate(prompt, params).tokens for prompt, params in asked]
    if threaded:
        model.start()
    assert [result.tokens for result in model.map(asked)] == alone
    by_number = dict(model.map(asked, ordered=False))
    assert [by_number[n].tokens for n in range(7)] == alone
    assert [r.tokens for r in model.generate_batch([p for p, _ in asked], [s for _, s in asked])] == alone
    model.close()
    with pytest.raises(Draining):
        list(model.map(asked))
