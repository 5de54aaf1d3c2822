"""What a request gets does not depend on who else is there, when, in which order, or on what goes wrong.

Every test runs the same twelve requests (`engines.mix`) in other company and compares with each of them alone: the same
tokens, and the same steps of each canvas, in float32.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma.engine import Request, Ticket
from dgemma.events import Commit, Early, Event
from engines import Injected, alone, answers, ask, assert_all_free, attribute, drive, engine_of, mix, result_of
from tiny import SPECS, Lab

SPEC = "base"
Answer = tuple[list[int], list[int]]


def told(events: list[Event]) -> Answer:
    """Tokens and steps of the result; what was given on the way is the same tokens."""
    result = result_of(events)
    assert [t for event in events if isinstance(event, Early | Commit) for t in event.tokens] == result.tokens
    return result.tokens, result.stats.steps_per_canvas


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network(SPEC)


@pytest.fixture(scope="module")
def requests(network: Any) -> list[Request]:
    return mix(network, SPECS[SPEC])


@pytest.fixture(scope="module")
def truth(network: Any, requests: list[Request]) -> list[Answer]:
    """Each request alone, with a cache that is large enough and prompts that are encoded whole."""
    found = [(result.tokens, result.stats.steps_per_canvas) for result in alone(network, requests)]
    assert len({tuple(tokens) for tokens, _ in found}) == len(requests), "equal answers could be exchanged unseen"
    return found


def in_order(tickets: list[Ticket], order: list[int], truth: list[Answer]) -> None:
    """Every request of the order has its own answer."""
    for ticket, index in zip(tickets, order, strict=True):
        assert told(list(ticket)) == truth[index], f"request {index}"


@pytest.mark.parametrize("size", [2, 5, 16])
def test_batches(network: Any, requests: list[Request], truth: list[Answer], size: int) -> None:
    """Any order, and the same request twice in one batch."""
    draw = random.Random(size)
    order = [draw.randrange(len(requests)) for _ in range(16)]
    engine = engine_of(network, max_batch=size, page_size=draw.choice([4, 16]))
    in_order(drive(engine, [requests[i] for i in order]), order, truth)
    assert_all_free(engine)


@pytest.mark.parametrize("seed", [0, 1])
def test_joining_between_steps(network: Any, requests: list[Request], truth: list[Answer], seed: int) -> None:
    draw = random.Random(100 + seed)
    order = draw.sample(range(len(requests)), len(requests))
    joins = [draw.randrange(25) for _ in order]
    engine = engine_of(network, max_batch=draw.choice([3, 16]), step_tokens=draw.choice([3, 40, 4096]), page_size=4)
    in_order(drive(engine, [requests[i] for i in order], joins=joins), order, truth)


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("size", [1, 4])
def test_preemption(network: Any, requests: list[Request], truth: list[Answer], size: int, reuse: bool) -> None:
    """A cache that holds one long request or a few short ones: many are put back in the middle."""
    draw = random.Random(size)
    order = draw.sample(range(len(requests)), len(requests))
    engine = engine_of(network, page_size=size, cache_tokens=100, step_tokens=30, prefix_reuse=reuse)
    in_order(drive(engine, [requests[i] for i in order]), order, truth)
    status = engine.status()
    assert status.preemptions > 2
    assert_all_free(engine)


def test_a_prompt_is_reused_at_most_once(network: Any, requests: list[Request]) -> None:
    """What a request takes up again of its own pages after it was put back is no reuse of a prompt."""
    engine = engine_of(network, page_size=4, cache_tokens=100, step_tokens=30)
    drive(engine, [requests[index] for index in (6, 9, 0)])
    assert engine.status().preemptions > 0 and engine.status().reused_tokens == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_that_are_cancelled(network: Any, requests: list[Request], truth: list[Answer], seed: int) -> None:
    """Half of the requests are cancelled at random steps, some before their first, in a cache that is too small."""
    draw = random.Random(200 + seed)
    order = [*range(len(requests)), *range(len(requests))]
    draw.shuffle(order)
    doomed = {place: draw.randrange(20) for place in draw.sample(range(len(order)), len(order) // 2)}
    engine = engine_of(network, page_size=4, cache_tokens=140, max_batch=8)

    def cancel(step: int, tickets: list[Ticket]) -> None:
        for place, when in doomed.items():
            if when == step:
                tickets[place].cancel()

    tickets = drive(engine, [requests[i] for i in order], before=cancel)
    left = [place for place in range(len(order)) if place not in doomed]
    in_order([tickets[place] for place in left], [order[place] for place in left], truth)
    assert_all_free(engine)


class Trap:
    """Raises at some of the calls of a network's method, before it does anything or when it is done."""

    def __init__(self, network: Any, name: str, calls: set[int]):
        self.method, self.calls, self.count, self.sprung = getattr(network, name), calls, 0, 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        if self.count in self.calls and self.count % 2:
            self.sprung += 1
            raise Injected
        value = self.method(*arguments, **named)
        if self.count in self.calls:
            self.sprung += 1
            raise Injected
        return value


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("run", {1, 4, 9, 12}),
        ("embed", {2, 7, 13}),
        ("look", {5, 40, 62, 75}),
        ("logits", {5, 40}),
    ],
)
def test_steps_that_fail(
    network: Any, requests: list[Request], truth: list[Answer], name: str, calls: set[int]
) -> None:
    """The error reaches whoever drives, wherever in a step it comes from; driven on, nobody's answer has changed."""
    engine = engine_of(network, page_size=4, cache_tokens=300)
    trap = Trap(network, name, calls)
    with attribute(network, name, trap):
        tickets = drive(engine, requests)
    assert trap.sprung == len(calls)
    in_order(tickets, list(range(len(requests))), truth)
    assert_all_free(engine)


def test_a_step_that_failed_is_tried_with_fewer(
    network: Any, requests: list[Request], truth: list[Answer], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody who reads an answer notices, unless the step fails with one request alone: then that one is told."""
    engine = engine_of(network)
    tickets = [engine.submit(request) for request in requests[:4]]
    with attribute(network, "run", Trap(network, "run", {3, 4, 7})):
        batches, running = [], engine.step()
        while running or len(batches) < 4:
            before = engine.status().steps
            engine._drive()
            if engine.status().steps > before:
                batches.append(engine.status().batch)
            running = engine.status().running + engine.status().queued > 0
    # Steps of four, of which the third fails, then of two, which fails, then of one until it is done.
    assert batches[:4] == [4, 4, 2, 1]
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]
    with pytest.raises(Injected):
        list(tickets[0])  # was alone in the seventh
    found = [list(ticket)[-1].result.tokens for ticket in tickets[1:]]  # type: ignore[union-attr]
    assert found == [tokens for tokens, _ in truth[1:4]]
    assert_all_free(engine)


@pytest.mark.parametrize("end", ["length", "stop"])
def test_a_failure_after_an_answer_was_complete(
    network: Any, requests: list[Request], truth: list[Answer], end: str
) -> None:
    """A request's last canvas is done, and then the same step fails at a neighbour's: the answer stays as it is."""
    prompt = requests[0].prompt
    short = ask(network, prompt, max_denoising_steps=1, seed=5, max_new_tokens=12)
    if end == "stop":
        (free,) = alone(network, [short])
        stop = max(free.tokens, key=free.tokens.index)
        short = ask(network, prompt, max_denoising_steps=1, seed=5, stop_token_ids=(stop,))
    (apart,) = alone(network, [short])
    assert apart.finish_reason == end and 0 < len(apart.tokens) <= 12
    engine = engine_of(network)
    tickets = [engine.submit(short), engine.submit(requests[3])]
    with attribute(network, "logits", Trap(network, "logits", {1})), pytest.raises(Injected):
        engine.step()
    assert told(list(tickets[0])) == (apart.tokens, apart.stats.steps_per_canvas)
    assert told(list(tickets[1])) == truth[3]
    assert_all_free(engine)


PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from engines import alone, answers, engine_of, mix
from tiny import SPECS, load_network

def plain(results):
    return [[r.tokens, r.stats.steps_per_canvas, r.logprobs and [t.logprob for t in r.logprobs]] for r in results]

torch.set_num_threads(1)
network = load_network(sys.argv[2])
requests = mix(network, SPECS[sys.argv[3]])
one = answers(engine_of(network, page_size=4, cache_tokens=120), requests[::-1])[::-1]
torch.set_num_threads(2)
some = [requests[3], requests[10], requests[11]]
print(json.dumps([*map(plain, (one, answers(engine_of(network), some), alone(network, some)))]))
"""


def test_another_process_and_two_threads(lab: Lab, truth: list[Answer]) -> None:
    """Nothing depends on how Python hashes strings, or on what ran before. With another number of threads sums may
    come out otherwise, but alike alone and in a batch, scores included.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(Path(__file__).parents[1]), str(lab.path(SPEC)), SPEC],
        env={**os.environ, "PYTHONHASHSEED": "4711", "GOMP_SPINCOUNT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, together, apart = json.loads(done.stdout)
    assert [(tokens, steps) for tokens, steps, _ in one] == truth
    assert together == apart and any(logs for _, _, logs in together)


@pytest.mark.parametrize("name", ["base", "large_vocab"])
def test_scores_are_the_same_to_the_last_bit(lab: Lab, name: str) -> None:
    """Stronger than tokens: log-probabilities, in batches, with reused pages and with prompts in chunks."""
    spec, network = SPECS[name], lab.network(name)
    asked = [
        Request(**{**vars(request), "params": type(request.params)(**{**vars(request.params), "logprobs": 2})})
        for request in mix(network, spec)
    ]
    asked = [asked[index] for index in (1, 4, 5, 8, 9)]
    apart = [answers(engine_of(network), [request])[0] for request in asked]
    together = answers(engine_of(network, step_tokens=11), asked)
    assert [result.tokens for result in together] == [result.tokens for result in apart]
    assert [result.logprobs for result in together] == [result.logprobs for result in apart]
