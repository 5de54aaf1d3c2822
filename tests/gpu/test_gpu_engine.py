"""The engine with the kernels for a GPU against the engine without: the same tokens, whatever is in the batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tensors import DEVICE
from torch.overrides import TorchFunctionMode

from dgemma.checkpoint import VisionIgnored
from dgemma.checkpoint import load_network as load_onto
from dgemma.config import ModelConfig
from dgemma.engine.card import CardForward, Graph
from dgemma.engine.inputs import Planner
from dgemma.errors import RequestError
from dgemma.kernels.triton import tiles
from engines import alone, answers, ask, engine_of, result_of, words
from late import LateCourier
from tiny import Spec, build, load_network

SPEC = Spec(name="card", layers="sf", window=6, canvas=8, vocab=50, seed=21)
CALM = {"max_denoising_steps": 3, "canvas_length": 5, "max_new_tokens": 8}
MIXES: dict[str, list[dict[str, Any]]] = {
    "one": [{"canvas_length": None, "max_new_tokens": 20, "max_denoising_steps": 5}],
    "several": [
        {"temperature": 0.0, "canvas_length": 5},
        {"temperature": 0.7, "canvas_length": 3},
        {"stop_at_end": True, "stop_token_ids": (5, 9), "seed": -3},
        {"stability_threshold": 0, "confidence_threshold": 9.0, "entropy_bound": 0.5},
    ],
    "likely words": [
        {"top_k": 5, "canvas_length": 2, "max_new_tokens": 2},
        {"top_p": 0.7, "canvas_length": 2, "max_new_tokens": 3},
        {"canvas_length": 2, "max_new_tokens": 2},
        {"min_p": 0.2, "temperature": 1.5, "canvas_length": 2, "max_new_tokens": 2},
        {"mode": "autoregressive", "max_new_tokens": 2, "top_p": 0.6, "top_k": 9},
    ],
    "likely words once an answer may end": [
        {"mode": "autoregressive", "temperature": 4.0, "max_new_tokens": 5, "min_tokens": 2, "top_k": 2},
        {"mode": "autoregressive", "temperature": 4.0, "max_new_tokens": 6},
    ],
    "wishes of their own": [
        {"top_k": 5, "logprobs": 0},
        {},
        {"logit_bias": {7: 3.0}, "min_tokens": 9, "stop_token_ids": (4,)},
        {"logprobs": 2},
        {"early_text": "eager", "max_denoising_steps": 4},
    ],
    "autoregressive": [
        {"mode": "autoregressive", "max_new_tokens": 3},
        {"mode": "autoregressive", "max_new_tokens": 2, "temperature": 0.0},
        {"max_new_tokens": 5},
        {"mode": "autoregressive", "max_new_tokens": 2, "logprobs": 1},
        {"mode": "autoregressive", "max_new_tokens": 4, "min_tokens": 2, "stop_token_ids": tuple(range(3, 40))},
    ],
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SPEC, tmp_path_factory.mktemp("checkpoint") / "card")


@pytest.fixture(scope="module")
def network(directory: Path) -> Any:
    return load_network(directory, "float32")


@pytest.mark.parametrize("mix", MIXES)
def test_same_tokens(network: Any, mix: str) -> None:
    """Prompts of any length, canvases that end at different times, commits beside first looks."""
    requests = [
        ask(network, words(SPEC, 3 + 5 * n, n), **{"seed": n, **CALM, **own}) for n, own in enumerate(MIXES[mix])
    ]
    wanted = alone(network, requests)
    engine = engine_of(copy.deepcopy(network).to(DEVICE), kernels="triton", step_tokens=12)
    assert isinstance(engine._forward, CardForward)
    for found, right in zip(answers(engine, requests), wanted, strict=True):
        assert found.tokens == right.tokens
        assert found.stats.steps_per_canvas == right.stats.steps_per_canvas


AUTO: dict[str, Any] = {"mode": "autoregressive", "temperature": 4.0}  # at 1 these networks say one token for ever


def test_a_long_answer_one_token_at_a_time(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pages' ends, with keys in more and more parts: the CPU's tokens. A step is laid out anew where a page is
    full, and a graph is made for each number of parts."""
    monkeypatch.setattr(tiles, "least_keys", lambda head_dim: 8)
    planned, plan = [], Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda *given, **named: planned.append(1) or plan(*given, **named))
    requests = [ask(network, words(SPEC, 9, 3), seed=5, max_new_tokens=40, **AUTO)]
    engine = engine_of(copy.deepcopy(network).to(DEVICE), kernels="triton")
    assert answers(engine, requests)[0].tokens == alone(network, requests)[0].tokens
    assert len(planned) == 1 + 1 + 2  # the prompt; the first token; pages of 16, to the 48th
    graphs = [key for key in engine._forward._graphs if key.pitch == 1]
    assert sorted(key.splits for key in graphs) == [(1, 1), (2, 1), (4, 1)]


def test_what_the_host_does_for_a_token(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all requests are at single tokens: one transfer there, one back, and nothing is laid out."""
    engine = engine_of(copy.deepcopy(network).to(DEVICE), kernels="triton", page_size=64)
    for number in range(3):
        engine.submit(ask(network, words(SPEC, 3 + number, number), seed=number, max_new_tokens=9, **AUTO))
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(Planner, "plan", None)
    with Watching() as seen:
        call = Graph.__call__
        monkeypatch.setattr(Graph, "__call__", seen.without(call))
        engine.step()
    moving = {"copy_", "cpu", "cuda", "to", "item", "numpy", "__bool__", "pin_memory"}
    assert [name for name in seen.names if name in moving] == ["copy_", "cpu"]
    assert len(seen.names) < 60 and engine.status().tokens == 3 * 4


class Watching(TorchFunctionMode):
    """Remembers the names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def without(self, function: Any) -> Any:
        """The function, with what it calls forgotten."""

        def call(*given: Any) -> Any:
            before = len(self.names)
            result = function(*given)
            del self.names[before:]
            return result

        return call


def test_who_is_no_number_fails_alone(network: Any) -> None:
    """One request's hidden states are no numbers; the others, of both modes, have their tokens."""
    sound = [ask(network, words(SPEC, 4, n), **{"seed": n, "max_new_tokens": 3, **AUTO}) for n in (2, 3)]
    sound += [ask(network, words(SPEC, 4, 4), **CALM)]
    wanted = [result.tokens for result in alone(network, sound)]
    bad = min(set(range(SPEC.vocab)).difference(*wanted, *(request.prompt for request in sound)))
    engine = engine_of(copy.deepcopy(network).to(DEVICE), kernels="triton")
    begin = engine._forward.fused.begin

    def spoilt(tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        x = begin(tokens, *others)
        x[: len(tokens)].masked_fill_((tokens == bad)[:, None], float("nan"))
        return x

    engine._forward.fused.begin = spoilt
    tickets = [engine.submit(request) for request in (ask(network, (3, bad, 4), **AUTO), *sound)]
    with pytest.raises(RequestError, match="not numbers"):
        list(tickets[0])
    assert [result_of(list(ticket)).tokens for ticket in tickets[1:]] == wanted


def test_scores_that_are_no_numbers_are_told(network: Any) -> None:
    """A word's row of the table is none, and no request has that word: hidden states are sound, scores are not."""
    own = copy.deepcopy(network).to(DEVICE)
    own.embed_tokens.weight[7] = float("nan")
    engine = engine_of(own, kernels="triton")
    for ticket in [engine.submit(ask(network, (3, 4), **{**AUTO, "temperature": heat})) for heat in (0.0, 1.0)]:
        with pytest.raises(RequestError, match="not numbers"):
            list(ticket)


def test_same_tokens_with_experts_in_host_memory(network: Any, directory: Path) -> None:
    """Streamed through two buffers; where there is no card, with copies that come as late as they may."""
    config = ModelConfig.read(directory / "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VisionIgnored)
        streamed = load_onto(directory, config, device=DEVICE, dtype=torch.float32, offload=True)
    assert streamed.expert_stream is not None
    late = LateCourier()
    if DEVICE == "cpu":
        streamed.expert_stream._courier = late
    streamed.expert_stream.begin()  # from here on nothing moves to a card that has room
    requests = [ask(network, words(SPEC, 3 + 5 * n, n), **{"seed": n, **CALM}) for n in range(2)]
    engine = engine_of(streamed.eval().requires_grad_(False), kernels="triton", step_tokens=12)
    assert isinstance(engine._forward, CardForward)
    wanted = alone(network, requests)
    assert [found.tokens for found in answers(engine, requests)] == [right.tokens for right in wanted]
    assert DEVICE != "cpu" or late.sent > 10
