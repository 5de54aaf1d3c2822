"""bfloat16: a batch may round otherwise than a request alone, but it's no further from the truth.

Eight bits of mantissa make ties common, libraries sum rows of a product in another order by the number of rows, and
attention adds page after page. One token that comes out otherwise changes all that follow, so tokens are compared by
count, and scores after a single look, where nothing has followed yet. The small random networks are the hardest case:
a score that's off by one bit can send a token to another expert, with quite other weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dgemma.engine import Request
from dgemma.events import Result
from engines import DEFAULTS, alone, answers, assert_all_free, engine_of, mix
from tiny import SPECS, Lab

NAMES = ["base", "many_experts"]


@pytest.mark.parametrize("name", NAMES)
def test_how_many_answers_differ(lab: Lab, name: str) -> None:
    """With pages of one size none of twelve differed on the machine where this was measured, with pages of another
    size and preemption up to five.
    """
    network = lab.network(name, "bfloat16")
    requests = mix(network, SPECS[name])
    truth = [result.tokens for result in alone(network, requests)]
    same = answers(engine_of(network, step_tokens=11), requests[::-1])[::-1]
    assert sum(result.tokens != own for result, own in zip(same, truth, strict=True)) <= 3
    engine = engine_of(network, page_size=4, cache_tokens=120)
    small = answers(engine, requests)
    assert sum(result.tokens != own for result, own in zip(small, truth, strict=True)) <= 8
    for result, own, request in zip(small, truth, requests, strict=True):
        if not request.params.stop_token_ids:
            assert len(result.tokens) == len(own) == request.settings.max_new_tokens
    assert_all_free(engine)


def one_look(request: Request) -> Request:
    """The same prompt, answered at the first look, with the twenty likeliest words of each place."""
    auto = request.params.mode == "autoregressive"
    params = replace(
        request.params,
        logprobs=20,
        max_new_tokens=1 if auto else request.canvas,
        max_denoising_steps=1,
        temperature=0.0,
        early_text="off",
        stop_token_ids=(),
        min_tokens=0,
    )
    return replace(request, params=params, settings=params.resolve(DEFAULTS))


def distance(some: list[Result], others: list[Result]) -> float:
    """Mean difference of the log-probabilities of words that are among the likeliest in both."""
    gaps: list[float] = []
    for one, other in zip(some, others, strict=True):
        for mine, yours in zip(one.logprobs or (), other.logprobs or (), strict=True):
            theirs = dict(yours.top)
            gaps += [abs(value - theirs[word]) for word, value in mine.top if word in theirs]
    assert len(gaps) > 500
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_as_near_to_the_truth_as_one_alone(lab: Lab, name: str) -> None:
    """Distances in nats from float32's scores on the same weights; a batch's distance from one alone is less."""
    half: Any = lab.network(name, "bfloat16")
    looks = [one_look(request) for request in mix(half, SPECS[name])]
    truth = alone(lab.network(name), looks)
    apart = alone(half, looks)
    together = answers(engine_of(half, page_size=4, cache_tokens=200, step_tokens=19), looks)
    assert 0 < distance(apart, truth) < 0.2
    assert distance(together, truth) < 1.25 * distance(apart, truth)
    assert distance(together, apart) < distance(apart, truth)
