"""One request in the engine against the readable loop: the same tokens and steps, and nearly the same scores.

The loop encodes everything afresh before each canvas, so pages, chunks of prompts, the window's edge and forwards that
encode and denoise at once all have to come out even.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dgemma.engine import forward
from dgemma.events import Commit, Result
from engines import answers, ask, engine_of, loop, result_of, words
from tiny import EOS, SPECS, Lab

# float32: attention sums in another order, and through random weights that grows with every step. Seen: 4e-5.
LOG_BOUND = 1e-3


@dataclass(frozen=True)
class Case:
    """A request's settings and the engine's, for one spec."""

    spec: str
    number: int
    length: int
    params: dict[str, Any]
    engine: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.spec}-{self.number}"


def sweep(per_spec: int) -> list[Case]:
    """Over all specs; every setting varies independently of the others."""
    cases = []
    for spec in SPECS.values():
        draw = random.Random(1000 + spec.seed)
        for number in range(per_spec):
            params: dict[str, Any] = {
                "seed": draw.randrange(1000),
                "max_new_tokens": spec.canvas + draw.choice([0, 1, 7, spec.canvas]),
                "max_denoising_steps": draw.choice([1, 4, 7]),
                "entropy_bound": draw.choice([0.5, 2.0, 6.0]),
                "confidence_threshold": draw.choice([0.2, 1.0]),
                "stability_threshold": draw.choice([0, 1, 2]),
                "temperature": draw.choice([0.0, 0.7, 1.0, 1.0]),
                "stop_token_ids": draw.choice([(), (), (EOS, 4), tuple(range(3, 20))]),
                "stop_at_end": draw.choice([False, True]),
                "min_tokens": draw.choice([0, 0, 3, spec.canvas + 2]),
                "logprobs": draw.choice([0, 3]),
            }
            limits: dict[str, Any] = {"top_k": 5, "top_p": 0.7, "min_p": 0.1, "logit_bias": {5: 3.0, 6: -9.0}}
            name = draw.choice([None, *limits])
            if name:
                params[name] = limits[name]
            if draw.random() < 0.3:
                params["canvas_length"] = max(1, spec.canvas - 5)
            if draw.random() < 0.25:
                heat = draw.choice([1.0, 4.0, 8.0])
                params |= {"mode": "autoregressive", "max_new_tokens": 10, "min_tokens": 3, "temperature": heat}
            near = min(spec.window, 40)
            engine = {
                "page_size": draw.choice([1, 3, 4, 16, 256]),
                "step_tokens": draw.choice([1, 5, 17, 64, 4096]),
            }
            length = draw.choice([1, near - 1, near, near + 1, near + spec.canvas + 3])
            cases.append(Case(spec.name, number, length, params, engine))
    return cases


def assert_equals_loop(network: Any, request: Any, result: Result) -> None:
    """Tokens and steps to the last one; log-probabilities within the bound."""
    tokens, steps, logs = loop(network, request)
    assert result.tokens == tokens
    assert result.stats.steps_per_canvas == steps
    assert result.finish_reason == ("length" if len(tokens) == request.settings.max_new_tokens else "stop")
    top = request.params.logprobs
    assert result.logprobs is not None and len(result.logprobs) == len(tokens)
    for token, own, truth in zip(tokens, result.logprobs, logs, strict=True):
        assert own.token == token
        assert own.logprob == pytest.approx(truth[token].item(), abs=LOG_BOUND)
        assert len(own.top) == top and len({place for place, _ in own.top}) == top
        assert [value for _, value in own.top] == pytest.approx(truth.topk(top).values.tolist(), abs=LOG_BOUND)
        for place, value in own.top:
            assert value == pytest.approx(truth[place].item(), abs=LOG_BOUND)


@pytest.mark.parametrize("case", sweep(2), ids=str)
def test_one_request(lab: Lab, case: Case) -> None:
    spec, network = SPECS[case.spec], lab.network(case.spec)
    request = ask(network, words(spec, max(1, case.length), seed=case.number), **case.params)
    engine = engine_of(network, **case.engine)
    events = list(engine.submit(request))
    result = result_of(events)
    assert_equals_loop(network, request, result)
    commits = [event for event in events if isinstance(event, Commit)]
    assert [token for commit in commits for token in commit.tokens] == result.tokens
    assert [log for commit in commits for log in commit.logprobs] == list(result.logprobs or ())


@pytest.mark.parametrize("name", ["base", "deep", "tiny_window", "odd"])
def test_a_long_answer(lab: Lab, name: str) -> None:
    """Many canvases and a far prompt: the window moves on by several pages, and pages are used again."""
    spec, network = SPECS[name], lab.network(name)
    request = ask(network, words(spec, 45), max_new_tokens=100, max_denoising_steps=2, logprobs=0, seed=3)
    engine = engine_of(network, page_size=4, cache_tokens=160, step_tokens=10)
    assert_equals_loop(network, request, answers(engine, [request])[0])


def test_the_contexts_last_canvas_is_short(lab: Lab) -> None:
    """What is left of the context, to the last token."""
    spec, network = SPECS["all_rotate"], lab.network("all_rotate")  # canvases of 48
    request = ask(network, words(spec, 20), limit=75, max_new_tokens=55, max_denoising_steps=3, logprobs=0)
    result = answers(engine_of(network), [request])[0]
    assert len(result.tokens) == 55
    assert_equals_loop(network, request, result)


def test_scores_in_tiles(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas's scores are made in tiles of positions where the vocabulary is large; nothing else changes."""
    spec, network = SPECS["all_rotate"], lab.network("all_rotate")
    monkeypatch.setattr(forward, "TILE_BYTES", 1)
    request = ask(
        network, words(spec, 9), max_new_tokens=60, min_tokens=20, stop_token_ids=(EOS, 4, 9), logprobs=2, top_p=0.9
    )
    engine = engine_of(network)
    assert engine._forward.tile < 48
    assert_equals_loop(network, request, answers(engine, [request])[0])


def test_the_loop_is_worth_comparing_with(lab: Lab) -> None:
    """Answers differ by seed and prompt, and neither settle at once nor never."""
    spec, network = SPECS["base"], lab.network("base")
    seen = [loop(network, ask(network, words(spec, 9, seed=n), seed=n % 2, max_new_tokens=16)) for n in range(4)]
    assert len({tuple(tokens) for tokens, _, _ in seen}) == 4
    steps = {count for _, counts, _ in seen for count in counts}
    assert len(steps) > 1 and 1 not in steps
    assert all(torch.isfinite(row).all() for _, _, logs in seen for row in logs)
