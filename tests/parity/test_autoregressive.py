"""Autoregressive mode against transformers: its encoder, one token after the other, and its head on the last state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from engines import answers, ask, engine_of, words
from tiny import SPECS, Lab, Reference, Spec, build, load_network

NAMES = ["base", "deep", "tiny_window", "multi_query", "top_all", "low_cap", "odd", "release_spelling", "thetas"]
BOUND = 2e-4  # of log-probabilities down to -12: norms, gates and sums round in another order, layer after layer
NEW = 14
Pair = tuple[Spec, Any, Reference]


@pytest.fixture(scope="module")
def pairs(lab: Lab) -> Callable[[str], Pair]:
    """A spec, its network and the reference's, by name. Layers add much to what they get, so that the likeliest next
    token isn't always the one before.
    """

    @cache
    def pair(name: str) -> Pair:
        spec = replace(SPECS[name], name=f"{name}_restless", mix=20.0)
        directory = build(spec, lab.root / spec.name)
        return spec, load_network(directory), Reference(directory)

    return pair


def reference_answer(reference: Reference, prompt: tuple[int, ...], new: int) -> tuple[list[int], torch.Tensor]:
    """The likeliest token each time, and the log-probabilities of all words at each place [new, V]."""
    cache, fresh = reference.new_cache(), torch.tensor([prompt])
    tokens, logs = [], []
    for _ in range(new):
        scores = reference.logits(reference.encode(fresh, cache)[0, -1])
        logs.append(torch.log_softmax(scores.double(), dim=-1))
        tokens.append(int(scores.argmax()))
        fresh = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(logs)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_log_probabilities(pairs: Callable[[str], Pair], name: str) -> None:
    """Prompts within the window and beyond it, all in one batch, some encoded in chunks."""
    spec, network, reference = pairs(name)
    prompts = [words(spec, length, seed=length) for length in (1, spec.window - 1, spec.window + 9, 3 * spec.window)]
    engine = engine_of(network, page_size=4, step_tokens=16)
    settings = {"mode": "autoregressive", "temperature": 0.0, "logprobs": 5, "max_new_tokens": NEW}
    results = answers(engine, [ask(network, prompt, **settings) for prompt in prompts])
    assert sum(len({*result.tokens}) for result in results) > 2 * len(results)
    for prompt, result in zip(prompts, results, strict=True):
        tokens, logs = reference_answer(reference, prompt, NEW)
        assert result.tokens == tokens
        assert result.logprobs is not None
        for place, own in enumerate(result.logprobs):
            assert own.logprob == pytest.approx(logs[place, own.token].item(), abs=BOUND)
            assert [value for _, value in own.top] == pytest.approx(logs[place].topk(5).values.tolist(), abs=BOUND)
            assert all(value == pytest.approx(logs[place, word].item(), abs=BOUND) for word, value in own.top)


def test_an_end_token_ends_it_there(pairs: Callable[[str], Pair]) -> None:
    """The first of the end tokens in the reference's own answer, or none of them before `min_tokens`."""
    spec, network, reference = pairs("base")
    prompts = (words(spec, 9, seed=seed) for seed in range(20))
    prompt, tokens = next(
        (own, tokens) for own in prompts if len({*(tokens := reference_answer(reference, own, NEW)[0])}) > 4
    )
    late = sorted({*tokens}, key=tokens.index)[-2:]  # the two that come last for the first time
    settings = {"mode": "autoregressive", "temperature": 0.0, "max_new_tokens": NEW, "stop_token_ids": (*late[::-1],)}
    free, held = answers(
        engine_of(network), [ask(network, prompt, **settings), ask(network, prompt, min_tokens=NEW, **settings)]
    )
    first = tokens.index(late[0])
    assert first > 0
    assert free.tokens == tokens[:first] and free.finish_reason == "stop"
    assert held.tokens[:first] == tokens[:first] and len(held.tokens) == NEW
    assert not {*late} & {*held.tokens} and held.finish_reason == "length"
