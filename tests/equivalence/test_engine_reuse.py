"""What is encoded once is used again: how much of it, which of it is forgotten first, and that it changes no answer.

Requests that fail alone leave their neighbours and those who come after them as they would be without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma.engine import Engine, Request
from dgemma.errors import RequestError
from dgemma.events import Commit, Result
from engines import alone, answers, ask, assert_all_free, attribute, engine_of, mix, words
from tiny import SPECS, Lab

# At low temperatures these networks say their last token again and again in autoregressive mode.
MODES: list[dict[str, Any]] = [{"mode": "diffusion"}, {"mode": "autoregressive", "temperature": 4.0}]
BAD = 33  # three of them in a row make the network stumble, see `stumbling`


@pytest.fixture(scope="module")
def network(lab: Lab) -> Any:
    return lab.network("base")


def reused(engine: Engine, request: Request) -> tuple[int, Result]:
    """Prompt tokens that needed no encoding, and the answer."""
    before = engine.status().reused_tokens
    (result,) = answers(engine, [request])
    return engine.status().reused_tokens - before, result


@pytest.mark.parametrize("mode", MODES, ids=["diffusion", "autoregressive"])
@pytest.mark.parametrize("size", [1, 4, 16, 256])
def test_a_beginning_seen_before(network: Any, size: int, mode: dict[str, Any]) -> None:
    """Whole pages of what two prompts share, but never the whole prompt."""
    spec = SPECS["base"]
    prompt = words(spec, 45)
    engine = engine_of(network, page_size=size)
    cases = [
        (prompt, 0),
        (prompt, 44 // size),
        ((*prompt[:30], 3, 4, 5, 6), 30 // size if prompt[30] != 3 else 31 // size),
        (prompt[:32], 31 // size),
        ((*prompt, 7, 8), 45 // size),
        ((prompt[0] + 1, *prompt[1:]), 0),
        (prompt[1:], 0),
    ]
    for seed, (tokens, pages) in enumerate(cases):
        request = ask(network, tokens, seed=seed, max_new_tokens=6, max_denoising_steps=3, **mode)
        count, result = reused(engine, request)
        assert count == pages * size
        assert [result.tokens] == [own.tokens for own in alone(network, [request])]
    assert_all_free(engine)


def test_reuse_can_be_turned_off(network: Any) -> None:
    engine = engine_of(network, page_size=4, prefix_reuse=False)
    request = ask(network, words(SPECS["base"], 30), max_new_tokens=4)
    answers(engine, [request, request])
    answers(engine, [request])
    assert engine.status().reused_tokens == 0 and engine.status().prompt_tokens == 90


@pytest.mark.parametrize(("mode", "left"), [(MODES[0], 16), (MODES[1], 1)])
def test_turns_of_a_chat(network: Any, mode: dict[str, Any], left: int) -> None:
    """A turn's prompt is the turn before with its answer; of that, all is there but the last canvas, or token."""
    engine, prompt, there = engine_of(network, page_size=4), words(SPECS["base"], 13), 0
    for turn in range(3):
        request = ask(network, prompt, seed=turn, max_new_tokens=32, max_denoising_steps=3, **mode)
        count, result = reused(engine, request)
        assert count == there // 4 * 4
        assert len(result.tokens) == 32
        assert [result.tokens] == [own.tokens for own in alone(network, [request])]
        there = len(prompt) + 32 - left
        prompt = (*prompt, *result.tokens, *words(SPECS["base"], 5, seed=turn))


@pytest.mark.parametrize(("again", "kept"), [(0, True), (1, False)])
def test_the_prompt_unused_for_longest_is_forgotten(network: Any, again: int, kept: bool) -> None:
    """Twelve pages: two prompts of four and one that needs seven, for which three old ones must go."""
    spec = SPECS["base"]
    engine = engine_of(network, page_size=4, cache_tokens=48)
    first, second, large = (ask(network, words(spec, n, seed=n), max_new_tokens=1) for n in (17, 18, 28))
    answers(engine, [first])
    answers(engine, [second])
    assert reused(engine, first)[0] == 16  # so the second is the older one now
    assert reused(engine, large)[0] == 0
    assert (reused(engine, [first, second][again])[0] == 16) == kept


def test_many_at_once_share_one_prompt(network: Any) -> None:
    """A prompt that is there takes pages once, however many use it, and stays while the last of them runs."""
    spec, shared = SPECS["base"], words(SPECS["base"], 65)
    engine = engine_of(network, page_size=4, cache_tokens=200)
    answers(engine, [ask(network, shared, max_new_tokens=1)])
    requests = [
        ask(network, (*shared, *words(spec, 1 + n, seed=n)), seed=n, max_new_tokens=16, max_denoising_steps=2 + n)
        for n in range(6)
    ]
    tickets = [engine.submit(request) for request in requests]
    engine.step()
    assert engine.status().running == 6 and engine.status().preemptions == 0
    # 16 pages shared; each has its own for the token that is left of the shared prompt and what comes after it.
    assert engine.status().pages_used == 16 + sum(-(-(2 + n) // 4) for n in range(6))
    tickets[2].cancel()
    found = [list(ticket)[-1].result.tokens for n, ticket in enumerate(tickets) if n != 2]  # type: ignore[union-attr]
    assert found == [result.tokens for n, result in enumerate(alone(network, requests)) if n != 2]
    assert_all_free(engine)


@contextmanager
def stumbling(network: Any) -> Iterator[None]:
    """A network that makes no number of the middle one of three `BAD` tokens."""
    embed: Callable[[Tensor], Tensor] = network.embed

    def stumble(tokens: Tensor) -> Tensor:
        bad = torch.nn.functional.pad(tokens == BAD, (1, 1))
        middle = bad[:, :-2] & bad[:, 1:-1] & bad[:, 2:]
        return embed(tokens).masked_fill(middle[..., None], float("nan"))

    with attribute(network, "embed", stumble):
        yield


@pytest.mark.parametrize("mode", MODES, ids=["diffusion", "autoregressive"])
def test_who_fails_fails_alone(network: Any, mode: dict[str, Any]) -> None:
    """Its neighbours' answers are those they have alone, and nobody who gets its pages is harmed."""
    spec = SPECS["base"]
    requests = mix(network, spec)
    bad = ask(network, (*words(spec, 10), BAD, BAD, BAD, *words(spec, 9)), **mode)
    truth = [result.tokens for result in alone(network, requests)]
    engine = engine_of(network, page_size=4, cache_tokens=200, max_batch=6)
    with stumbling(network):
        order = [requests[0], bad, *requests[1:5], bad, *requests[5:]]
        tickets = [engine.submit(request) for request in order]
        found = []
        for ticket, request in zip(tickets, order, strict=True):
            if request is bad:
                with pytest.raises(RequestError, match="not numbers"):
                    list(ticket)
                assert list(ticket) == []
            else:
                found.append(list(ticket)[-1].result.tokens)  # type: ignore[union-attr]
    assert found == truth
    assert_all_free(engine)
    assert [result.tokens for result in answers(engine, requests)] == truth


def test_reuse_is_counted_for_who_had_to_wait(network: Any) -> None:
    """A request that finds no memory at first takes up what is there when it gets in, and that is counted."""
    prompt = words(SPECS["base"], 33)
    engine = engine_of(network, page_size=4, cache_tokens=80)
    answers(engine, [ask(network, prompt, max_new_tokens=1)])  # leaves 8 known pages of 20
    tickets = [engine.submit(ask(network, words(SPECS["base"], 48, seed=1), max_new_tokens=4))]  # takes the other 12
    tickets.append(engine.submit(ask(network, (*prompt, 5), max_new_tokens=4)))
    engine.step()
    assert engine.status().running == engine.status().queued == 1
    for ticket in tickets:
        list(ticket)
    assert engine.status().reused_tokens == 32


@pytest.mark.parametrize("mode", MODES, ids=["diffusion", "autoregressive"])
def test_the_same_prompt_on_a_sound_network(network: Any, mode: dict[str, Any]) -> None:
    """What a failed request has encoded is not taken for the prompt's encoding later: not by the same request, nor by
    one that has only its beginning, which the failed request's window had left behind.
    """
    prompt = (*words(SPECS["base"], 6), BAD, BAD, BAD, *words(SPECS["base"], 44))
    bad, beginning = (ask(network, part, max_new_tokens=8, **mode) for part in (prompt, prompt[:22]))
    engine = engine_of(network, page_size=4)
    with stumbling(network), pytest.raises(RequestError):
        answers(engine, [bad])
    for request in (bad, beginning, bad):
        assert answers(engine, [request])[0].tokens == alone(network, [request])[0].tokens


def test_what_fails_in_the_middle(network: Any) -> None:
    """A canvas that goes wrong after others were committed: they are told, then comes the error."""
    spec = SPECS["base"]
    requests = [ask(network, words(spec, 20), seed=n, max_new_tokens=48) for n in range(3)]
    truth = [result.tokens for result in alone(network, requests)]
    engine = engine_of(network, page_size=4)
    tickets = [engine.submit(request) for request in requests]
    while len(engine._running) < 3 or engine._running[1].soft is None or len(engine._running[1].tokens) < 16:
        engine.step()
    soft = engine._running[1].soft
    assert soft is not None
    soft.fill_(float("nan"))
    events = iter(tickets[1])
    assert [event.tokens for event in [next(events)] if isinstance(event, Commit)] == [truth[1][:16]]
    with pytest.raises(RequestError, match="not numbers"):
        next(events)
    assert [list(tickets[n])[-1].result.tokens for n in (0, 2)] == [truth[0], truth[2]]  # type: ignore[union-attr]
    assert_all_free(engine)
