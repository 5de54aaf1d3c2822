"""A network in several processes gives the answers of one: the same tokens, whoever is in the batch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.config import ModelConfig
from dgemma.errors import ConfigError, DGemmaError
from dgemma.model.ranks import Ranks
from dgemma.quant import quantize
from engines import words
from nvfp4 import nvfp4
from tiny import SPECS, Lab, Spec, config

SETTINGS = EngineSettings(cache_tokens=1024, page_size=16, step_tokens=24)
REQUESTS: list[dict[str, Any]] = [
    {"max_new_tokens": 40},
    {"temperature": 0.0, "canvas_length": 7},
    {"top_k": 5, "stop_at_end": True},
    {"mode": "autoregressive", "max_new_tokens": 9},
    {"logprobs": 2},
    {"early_text": "eager"},
]


def answers(model: dgemma.Model, spec: str, count: int) -> list[Any]:
    """Tokens and steps of the first requests, all at once."""
    work = [
        (list(words(SPECS[spec], 3 + 17 * n, n)), SamplingParams(**{"seed": n, "max_new_tokens": 24, **own}))
        for n, own in enumerate(REQUESTS[:count])
    ]
    return [(result.tokens, result.stats.steps_per_canvas) for result in model.map(work)]


@pytest.mark.parametrize(
    ("spec", "ranks", "count"), [("base", 2, 6), ("release_spelling", 4, 2), ("multi_query", 4, 1)]
)
def test_the_same_tokens(lab: Lab, spec: str, ranks: int, count: int) -> None:
    """Grouped heads, key heads that several ranks share, windows, odd numbers of words and columns."""
    wanted = answers(dgemma.load(lab.path(spec), "cpu", "float32", engine=SETTINGS), spec, count)
    model = dgemma.load(lab.path(spec), "cpu", "float32", engine=SETTINGS, tensor_parallel=ranks)
    try:
        assert model.config == ModelConfig.read(lab.path(spec) / "config.json")
        assert model.network.config.layers[0].heads == model.config.layers[0].heads // ranks
        assert answers(model, spec, count) == wanted
        assert answers(model, spec, 1) == wanted[:1]  # from the pages of the first time
    finally:
        model.close()


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_weights_in_few_bits(tmp_path: Path, form: str) -> None:
    """The demo model, cut at the groups' boundaries: scores as of one process, within rounding of activations."""
    from dgemma.checkpoint import resolve
    from dgemma.checkpoint.quantize import quantize_checkpoint
    from dgemma.quant import Policy

    quantize_checkpoint(resolve("demo"), tmp_path / form, Policy(format=form))
    params = SamplingParams(seed=3, max_new_tokens=32)
    prompt = "What is 347 + 285?"
    wanted = dgemma.load(tmp_path / form, "cpu").generate(prompt, params)
    model = dgemma.load(tmp_path / form, "cpu", tensor_parallel=2)
    try:
        assert model.network.quantized().keys() == dgemma.load(tmp_path / form, "cpu").network.quantized().keys()
        assert model.generate(prompt, params).text == wanted.text
    finally:
        model.close()


def test_a_rank_that_dies(lab: Lab) -> None:
    """Who waits gets one clear line, nobody hangs, and the model says that it has ended."""
    model = dgemma.load(lab.path("base"), "cpu", "float32", engine=SETTINGS, tensor_parallel=2)
    try:
        ticket = model.submit([5, 6, 7], SamplingParams(max_new_tokens=900, seed=1))
        events = iter(ticket)
        next(events)
        (process,) = model._team._processes  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DGemmaError, match=r"rank 1 of 2 ended by signal 9.*load the model again"):
            list(events)
        assert time.monotonic() - started < 20
        with pytest.raises(DGemmaError, match="takes no new requests"):
            model.generate([5, 6, 7])
    finally:
        model.close()


def test_what_cannot_be_divided_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    """Before any process is started; and what a rank finds wrong is told by the first one."""
    with pytest.raises(ConfigError, match=r"3 does not divide the 4 heads"):
        dgemma.load(lab.path("base"), "cpu", tensor_parallel=3)
    with pytest.raises(ConfigError, match=r"9 is not a number from 1 to 8"):
        dgemma.load(lab.path("base"), "cpu", tensor_parallel=9)
    with pytest.raises(ConfigError, match=r"2 ranks are more than the 1 experts"):
        dgemma.load(lab.path("one_expert"), "cpu", tensor_parallel=2)
    with pytest.raises(DGemmaError, match=r"model\.safetensors"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_bytes((lab.path("base") / "config.json").read_bytes())
        dgemma.load(tmp_path / "empty", "cpu", tensor_parallel=2)


def test_parts_in_few_bits_make_the_whole() -> None:
    """Along either axis, and for experts: values, scales, and what they are multiplied with."""
    spec = Spec(name="cut", hidden=128, intermediate=128, experts=4, moe_intermediate=32)
    sizes = ModelConfig.from_dict(config(spec).to_dict())
    parts = [Ranks(rank=rank, size=2, config=sizes) for rank in range(2)]
    cases = {
        "layers.0.mlp.down_proj.weight": (128, 128),
        "layers.0.mlp.up_proj.weight": (128, 128),
        "layers.0.experts.down_proj": (4, 128, 32),
    }
    for name, shape in cases.items():
        for weight in (nvfp4(*shape), quantize(torch.randn(shape), bits=4, group=32)):
            cut = [rank.cut(name, weight).dequantize() for rank in parts]
            axis = int("down_proj.weight" in name)
            assert cut[0].shape[axis] == shape[axis] // 2
            assert torch.equal(torch.cat(cut, dim=axis), weight.dequantize())


def test_parts_make_the_whole(lab: Lab) -> None:
    """Every number of a cut matrix is with one rank, key heads that are shared with several."""
    network = lab.network("multi_query")
    parts = [Ranks(rank=rank, size=4, config=network.config) for rank in range(4)]
    for name, weight in network.state_dict().items():
        cut = [rank.cut(name, weight) for rank in parts]
        if "k_proj" in name or "v_proj" in name:
            assert all(torch.equal(one, weight) for one in cut)  # one key head for all
        elif cut[0].shape != weight.shape:
            axis = next(n for n, (a, b) in enumerate(zip(cut[0].shape, weight.shape, strict=True)) if a != b)
            assert torch.equal(torch.cat(cut, dim=axis), weight)
        else:
            assert "norm" in name or "scal" in name or "router" in name
