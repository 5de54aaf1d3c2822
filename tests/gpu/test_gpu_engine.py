"""The engine with the kernels for a GPU against the engine without: the same tokens, whatever is in the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from gpu_tensors import DEVICE

from dgemma.engine.card import CardForward
from engines import alone, answers, ask, engine_of, words
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
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_network(build(SPEC, tmp_path_factory.mktemp("checkpoint") / "card"), "float32")


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
