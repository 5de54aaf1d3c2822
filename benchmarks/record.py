"""Where a benchmark's figures go: raw records with what they were measured on, and a short summary."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


class Results:
    """One run's folder: `config.json`, `env.json`, `records.jsonl`, `summary.md`.

    Args:
        name: of the benchmark.
        config: what it was asked for.
        into: the folder above; None for the repository's own.
        folder: one that another process has begun; records are added to what is there.
    """

    def __init__(self, name: str, config: dict[str, Any], into: Path | None = None, folder: Path | None = None):
        self.name, self.records = name, []  # type: ignore[var-annotated]
        if folder is not None:
            self.folder = folder
            return
        day = datetime.date.today().isoformat()
        self.folder = (into or RESULTS) / f"{day}-{hardware()}-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (self.folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        (self.folder / "records.jsonl").write_text("")

    def add(self, **record: Any) -> None:
        """Writes one raw record."""
        self.records.append(record)
        with (self.folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def close(self, summary: str, figures: dict[str, Any]) -> str:
        """Writes the summary; returns the last line of output, one JSON object."""
        (self.folder / "summary.md").write_text(summary.rstrip() + "\n")
        return json.dumps({"benchmark": self.name, "results": self.folder.name, **figures})


def hardware() -> str:
    """A word for this machine: the GPU's name or the processor's, and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model.lower().replace(' ', '-')}-{len(os.sched_getaffinity(0))}-cores"


def environment() -> dict[str, Any]:
    """Versions, commit, threads."""
    packages = ("torch", "transformers", "numpy", "dgemma")
    versions = {name: importlib.metadata.version(name) for name in packages if _installed(name)}
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout
    return {
        "hardware": hardware(),
        "python": platform.python_version(),
        "packages": versions,
        "commit": commit.strip(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
