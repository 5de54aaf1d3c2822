"""The check for a machine with a GPU, all of it, at tiny sizes in Triton's interpreter, also where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "kernels": {"kernels_wrong", "kernels_to_library"},
    "engine": {"engine_same", "offload_same", "ranks_same"},
    "steps": {"step_ms", "memory_gb", "S3", "S4", "S6"},
    "protocol": {"tokens_per_second", "S5"},
    "transformers": {"transformers"},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_dry_run(section: str, tmp_path: Path) -> None:
    """Each section ends well, and its figures are in the last line; nothing is said to have been measured."""
    command = [sys.executable, "-W", "ignore", "benchmarks/gpu_check.py", "--tiny", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [*command, section, "--forms", "int4"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures.keys() >= SECTIONS[section] and not figures["left_out"]
    if section == "kernels":
        assert figures["kernels_wrong"] == [] and len(figures["kernels_to_library"]) > 10
    if section == "engine":
        assert figures["engine_same"] == figures["offload_same"] == figures["ranks_same"] == "2/2"
    folder = tmp_path / figures["results"]
    assert "no figure" in (folder / "summary.md").read_text()
    assert (folder / "records.jsonl").read_text().count(f'"section": "{section}"') >= 1


def test_wrong_sections_are_refused() -> None:
    """By name, before anything runs."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "kernel"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "kernel: no such section" in done.stderr
