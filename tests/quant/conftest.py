"""Small checkpoints whose widths divide into groups of 32, and their copies in few bits."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits import SPEC, Formats

from dgemma.checkpoint import VisionIgnored, load_network
from dgemma.checkpoint.kept import PackedCopyUnused
from dgemma.checkpoint.quantize import quantize_checkpoint
from dgemma.config import ModelConfig
from dgemma.quant import Policy


@pytest.fixture(autouse=True)
def _one_warning_less() -> Any:
    """These checkpoints have a vision tower, as the release does; each load says that it stays on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VisionIgnored)
        warnings.simplefilter("error", PackedCopyUnused)  # said only where a test asks for it
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packed copies are kept, if a test keeps any."""
    monkeypatch.setenv("DGEMMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32, in several shards."""
    import tiny

    return tiny.build(SPEC, tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="session")
def copies(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Formats:
    """`copies("int4")`: the directory of that copy, made once."""
    made: dict[str, Path] = {}

    def copy(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp("copies") / form
            quantize_checkpoint(source, made[form], Policy(format=form))
        return made[form]

    return copy


@pytest.fixture
def load() -> Callable[..., Any]:
    """`load(directory, **options)`: its network in float32."""

    def call(directory: Path, **options: Any) -> Any:
        config = ModelConfig.read(directory / "config.json")
        return load_network(directory, config, **{"dtype": torch.float32, **options})

    return call


@pytest.fixture
def model(copies: Formats, tmp_path: Path) -> Path:
    """An int4 checkpoint of the test's own."""
    return Path(shutil.copytree(copies("int4"), tmp_path / "model"))
