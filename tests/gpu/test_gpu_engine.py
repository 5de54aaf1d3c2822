"""The engine with the kernels for a GPU against the engine without: the same tokens, whatever is in the batch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tensors import DEVICE

from dgemma.checkpoint import VisionIgnored
from dgemma.checkpoint import load_network as load_onto
from dgemma.config import ModelConfig
from dgemma.engine.card import CardForward
from engines import alone, answers, ask, engine_of, words
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
    "wishes of their own": [
        {"top_k": 5},
        {},
        {"logit_bias": {7: 3.0}, "min_tokens": 9, "stop_token_ids": (4,)},
        {"logprobs": 2},
        {"early_text": "eager", "max_denoising_steps": 4},
    ],
    "autoregressive": [
        {"mode": "autoregressive", "max_new_tokens": 3},
        {"mode": "autoregressive", "max_new_tokens": 2, "temperature": 0.0},
        {"max_new_tokens": 5},
        {"mode": "autoregressive", "max_new_tokens": 2, "top_p": 0.6},
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
