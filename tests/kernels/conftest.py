"""Every instruction set that runs here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma.kernels import native

NEEDED = "the compiled kernels are missing; `pip install -e .` builds them"


def _running() -> list[str]:
    try:
        return native.running(native.load(Path(native.__file__).with_name(native.LIBRARY)))
    except OSError:
        return []


@pytest.fixture(params=_running() or ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn, in use."""
    if request.param == "none":
        if shutil.which("c++"):
            pytest.fail(NEEDED)
        pytest.skip(NEEDED)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.library.cache_clear()
    library = native.library()
    assert library is not None
    assert library.dgemma_use(request.param.encode())
    yield request.param
    library.dgemma_use(native.running(library)[0].encode())
