"""Fixtures of the server's tests: the real server on a real port, with a model that has no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fake import FakeModel
from servers import Running, launch

import dgemma
from dgemma.checkpoint import save_checkpoint
from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.model import Network
from dgemma.params import GenerationConfig
from dgemma.train import recipes


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for a module; its model's `calls` and `tickets` grow."""
    running = launch(FakeModel())
    yield running
    running.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Starts servers with a model and settings of their own; they end with the test."""
    servers: list[Running] = []

    def begin(model: Any = None, **settings: Any) -> Running:
        servers.append(launch(FakeModel() if model is None else model, **settings))
        return servers[-1]

    yield begin
    for one in servers:
        one.stop()


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    """The official client of the module's server."""
    return server.client()


@pytest.fixture(scope="module")
def nonsense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that writes nonsense, in canvases of 16 tokens."""
    text = {
        **recipes.DEMO_CONFIG["text_config"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "sliding_window": 8,
        "max_position_embeddings": 1024,
    }
    config = ModelConfig.from_dict({**recipes.DEMO_CONFIG, "canvas_length": 16, "text_config": text})
    network = Network(config)
    recipes.initialize(network, 0)
    path = tmp_path_factory.mktemp("nonsense")
    generation = GenerationConfig(max_new_tokens=40, max_denoising_steps=4, eos_token_ids=(1, 106), pad_token_id=0)
    save_checkpoint(network, config, path, generation=generation, text_files=Path(dgemma.__file__).parent / "demo")
    return path


@pytest.fixture
def begin(nonsense: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers, four requests at a time, on one data folder."""
    servers: list[Running] = []

    def go(**settings: Any) -> Running:
        engine = dgemma.EngineSettings(max_batch=4, max_queue=64)
        model = dgemma.load(nonsense, engine=engine)
        model.name = "tiny"
        servers.append(launch(model, **{"data_dir": tmp_path / "data", **settings}))
        return servers[-1]

    yield go
    for one in servers:
        one.stop()
        one.model.close()
