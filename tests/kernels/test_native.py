"""The library: which instruction set, what without it, and building without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from dgemma.errors import ConfigError
from dgemma.kernels import cpu, native
from dgemma.quant import quantize

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    """Each test chooses anew, and what it chose does not last."""
    native.library.cache_clear()
    yield
    monkeypatch.undo()
    native.library.cache_clear()
    library = native.library()
    if library is not None:
        library.dgemma_use(native.running(library)[0].encode())


def test_forced_by_the_environment(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path by its name."""
    native.library.cache_clear()
    monkeypatch.setenv(native.VARIABLE, isa)
    assert cpu.isa() == isa and cpu.available()


def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a warning; weights then stay as they are."""
    monkeypatch.setenv(native.VARIABLE, "reference")
    weight = quantize(torch.randn(4, 32), bits=8, group=None, search=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cpu.available() and cpu.isa() == "reference"
        assert cpu.pack(weight) is weight


@pytest.mark.parametrize("name", ["avx1024", "neon" if os.uname().machine == "x86_64" else "avx2"])
def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By the variable's name, with what can."""
    monkeypatch.setenv(native.VARIABLE, name)
    with pytest.raises(ConfigError, match=f"DGEMMA_CPU_ISA: '{name}' cannot run here; what can: reference.*portable"):
        cpu.available()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, once; results as before, by the twins. A forced path is an error."""
    weight = quantize(torch.randn(8, 64), bits=4, group=32, search=False)
    x = torch.randn(5, 64)
    compiled = cpu.linear(x, cpu.pack(weight))
    native.library.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", "missing.so")
    with pytest.warns(native.SlowKernels, match="plain torch"):
        assert not cpu.available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cpu.linear(x, cpu.pack(weight)), compiled)
        scores = torch.randn(3, 10)
        assert cpu.read(scores, cpu.Wish(heat=1.0), None)[0].argmax.shape == (3,)
        assert cpu.vocabulary(x, weight, cpu.Wish(heat=1.0)).soft is not None
    native.library.cache_clear()
    monkeypatch.setenv(native.VARIABLE, "portable")
    with pytest.raises(ConfigError, match="DGEMMA_CPU_ISA: portable needs the compiled kernels"):
        cpu.available()


def test_importing_loads_nothing() -> None:
    """Neither torch nor the library is loaded by the import of the room."""
    code = "import dgemma.kernels, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT / "src")


def test_building_without_a_compiler(tmp_path: Path) -> None:
    """The build goes on without the library, and says so."""
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stderr + done.stdout
    assert not list(tmp_path.rglob(native.LIBRARY))
