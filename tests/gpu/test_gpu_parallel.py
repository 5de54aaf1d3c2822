"""A network in several processes through the kernels for a GPU: the tokens of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_tensors import DEVICE

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.engine.card import CardForward
from engines import words
from tiny import Spec, build

SPEC = Spec(name="ranks", layers="sf", window=6, canvas=8, vocab=51, experts=5, seed=22)
CALM: dict[str, Any] = {"max_denoising_steps": 2, "canvas_length": 5, "max_new_tokens": 5}
REQUESTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0, "stop_at_end": True},
    {"top_k": 5},
    {"mode": "autoregressive", "max_new_tokens": 2},
]


def answers(model: dgemma.Model, count: int) -> list[Any]:
    work = [
        (list(words(SPEC, 3 + 3 * n, n)), SamplingParams(**{"seed": n, **CALM, **own}))
        for n, own in enumerate(REQUESTS[:count])
    ]
    return [(result.tokens, result.stats.steps_per_canvas) for result in model.map(work)]


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels run where there is a card, and these processes have none")
@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 1)])
def test_the_same_tokens(tmp_path: Path, ranks: int, count: int) -> None:
    """Words, experts and inner columns that do not divide evenly; key heads that ranks share; sampling on the board,
    as on a CPU, and autoregressive."""
    directory = build(SPEC, tmp_path / "ranks")
    settings = EngineSettings(cache_tokens=512, page_size=16, step_tokens=24, kernels="torch")
    wanted = answers(dgemma.load(directory, "cpu", "float32", engine=settings), count)
    settings = EngineSettings(cache_tokens=512, page_size=16, step_tokens=24, kernels="triton")
    model = dgemma.load(directory, "cpu", "float32", engine=settings, tensor_parallel=ranks)
    try:
        assert isinstance(model.engine._forward, CardForward)
        assert answers(model, count) == wanted
    finally:
        model.close()
