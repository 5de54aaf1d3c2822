"""Fixtures of the command line's tests: a model without a network, and commands run in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fake_model import FakeModel, Invoke

import dgemma
from dgemma.cli import app


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """The model that every `--model` loads; `loaded` on it is what `dgemma.load` was called with."""
    fake = FakeModel()

    def load(name: str = "demo", **settings: Any) -> FakeModel:
        fake.loaded = {"name": name, **settings}  # type: ignore[attr-defined]
        return fake

    monkeypatch.setitem(vars(dgemma), "load", load)  # setattr would look at the real one first, and load torch
    return fake


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`invoke("generate", "hi", input=…)` runs the command; its stdout and stderr are apart."""
    monkeypatch.delenv("DGEMMA_DEBUG", raising=False)

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=input)

    yield run
