"""The kernels on random shapes under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers of exact sizes."""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = [
    "-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror",
    "-Wno-maybe-uninitialized", "-Wno-ignored-attributes",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
COMMON = [
    *(f"csrc/{name}.cpp" for name in ("team", "matrix", "linear", "experts", "read", "vocabulary", "isa_portable")),
    "tests/kernels/driver.cpp",
]
EMULATED = ["-mavx2", "-include", "tests/kernels/emulated_x86.h"]
# What else is compiled, and how; on x86 the paths that few processors have, with their instructions in plain C++.
PATHS = {
    "x86_64": {
        "tests/kernels/every_path.cpp": [],
        "csrc/isa_avx2.cpp": ["-mavx2"],
        "csrc/isa_avxvnni.cpp": EMULATED,
        "csrc/isa_avx512vnni.cpp": EMULATED,
    },
    "aarch64": {
        "csrc/choose.cpp": ["-DDGEMMA_HAS_NEON"],
        "csrc/isa_neon.cpp": ["-march=armv8.2-a+dotprod"],
    },
}
RAN = {"x86_64": "avx512vnni avxvnni avx2 portable", "aarch64": "neon portable"}


@pytest.mark.skipif(COMPILER is None or platform.machine() not in PATHS, reason="needs a compiler with sanitizers")
@pytest.mark.timeout(600)
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """Every path: right, the same bits from each, and no access or overflow out of bounds."""
    units: dict[str, list[str]] = {name: [] for name in COMMON} | PATHS[platform.machine()]

    def build(unit: tuple[str, list[str]]) -> str:
        source, own = unit
        target = str(tmp_path / (Path(source).stem + ".o"))
        run([str(COMPILER), *FLAGS, *own, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, units.items()))
    run([str(COMPILER), *FLAGS, *objects, "-pthread", "-o", str(tmp_path / "driver")])
    said = run([str(tmp_path / "driver"), "6"])
    checks, ran = said.split(" checks: ")
    assert int(checks) > 10_000 and ran.strip() == RAN[platform.machine()]


def run(command: list[str]) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
