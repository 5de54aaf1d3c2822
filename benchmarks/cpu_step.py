"""The 26B on a CPU: a whole step beside transformers, all layers from disk, prompt encoding.

    python benchmarks/cpu_step.py layers6 [DIRECTORY]    a step of the first 6 layers beside transformers in bfloat16
    python benchmarks/cpu_step.py encode [DIRECTORY]     prompt tokens a second, 6 layers, beside transformers
    python benchmarks/cpu_step.py whole DIRECTORY        all layers: load, seconds a step, memory, where the time goes
    python benchmarks/cpu_step.py restart DIRECTORY      starts: from the files, keeping a packed copy, mapping it

Random weights at real sizes, as `make_26b.py` writes them; without DIRECTORY it is called first. They measure time and
memory and say nothing of text; routing is near uniform and no word is unlikely, the worst case of both. A step is all
of it: the network's forward, the vocabulary's statistics, sampling, acceptance, noise, soft embeddings for the next.
Ours runs in the engine; transformers in its own `generate`, on the same weights made bfloat16 (`--peer float32` where a
processor has no arithmetic for that). The two are processes that take turns; ratios are medians of pairs. Memory is the
process's own maximum (VmHWM), loading included. The peak is that of our own products on weights that stay in caches,
in the same run. `restart` keeps its copy beside DIRECTORY, as large once more, for as long as it runs; "cold" is with
all files dropped from memory first, which takes root. Raw records are written under benchmarks/results/; the last line
of output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import Results

from dgemma.config import ModelConfig

HERE = Path(__file__).parent
SIDES = ("dgemma", "transformers")


class Worker:
    """One side, in a process of its own; it finds no packed copy but in `cache`."""

    def __init__(self, side: str, directory: Path, dtype: str, cache: str = os.devnull):
        started = time.perf_counter()
        command = [sys.executable, str(HERE / "cpu_workers.py"), side, str(directory), dtype]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"DGEMMA_CACHE": cache}
        )
        self.side, self.loaded = side, self._answer()
        self.started = time.perf_counter() - started

    def ask(self, *words: object) -> dict[str, Any]:
        """Sends a command and waits for what it brings."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.side}: ended early, with {self.process.wait()}")
        self.last: dict[str, Any] = json.loads(line)
        return self.last

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(directory: Path, dtype: str, *sides: str) -> Iterator[list[Worker]]:
    """Processes that have loaded a checkpoint, one after another."""
    running: list[Worker] = []
    try:
        for side in sides:
            running.append(Worker(side, directory, dtype))
        yield running
    finally:
        for worker in running:
            worker.close()


@contextlib.contextmanager
def six_layers(given: Path | None) -> Iterator[Path]:
    """A checkpoint of the first 6 layers, made for the time being if none is given."""
    with tempfile.TemporaryDirectory() as folder:
        if given is None:
            given = Path(folder) / "int4"
            made = [sys.executable, str(HERE / "make_26b.py"), str(given), "--layers", "6"]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        yield given


def pairs(results: Results, sides: list[Worker], rounds: int, *words: object) -> dict[str, Any]:
    """The same command to both in turn: median seconds of each, and the median ratio of the rounds."""
    times: dict[str, list[float]] = {side.side: [] for side in sides}
    for number in range(rounds):
        for side in sides:
            answer = side.ask(*words, number)
            results.add(section=words[0], side=side.side, round=number, **answer)
            times[side.side].append(statistics.median(answer["seconds"]))
    ours, theirs = (times[side] for side in SIDES)
    ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
    return {
        "dgemma_seconds": statistics.median(ours),
        "transformers_seconds": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
    }


def layers6(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """A whole step beside transformers."""
    with six_layers(options.directory) as directory, workers(directory, options.peer, *SIDES) as sides:
        figures: dict[str, Any] = {"layers": ModelConfig.read(directory / "config.json").num_layers}
        figures["scores_differ_by"] = _difference(sides)
        figures |= pairs(results, sides, options.rounds, "steps", options.steps)
        for side in sides:
            figures[f"{side.side}_most_memory_gb"] = side.last["most"] / 1e9
        return figures


def encode(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """A prompt beside transformers."""
    with six_layers(options.directory) as directory, workers(directory, options.peer, *SIDES) as sides:
        for side in sides:
            side.ask("encode", options.tokens, 1)
        figures = pairs(results, sides, options.rounds, "encode", options.tokens)
        rates = {f"{side.side}_tokens_per_second": options.tokens / figures[f"{side.side}_seconds"] for side in sides}
        return {"tokens": options.tokens} | figures | rates


def whole(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """All layers of a checkpoint on disk."""
    if options.directory is None:
        raise SystemExit("whole: needs a directory; benchmarks/make_26b.py writes one")
    config = ModelConfig.read(options.directory / "config.json")
    with workers(options.directory, options.peer, SIDES[0]) as (ours,):
        figures: dict[str, Any] = {"layers": config.num_layers, "load_seconds": ours.loaded["loaded"]}
        figures["memory_loaded_gb"] = ours.loaded["now"] / 1e9
        seconds, resident = [], []
        for number in range(options.canvases):
            answer = ours.ask("steps", options.steps, number)
            results.add(section="canvas", number=number, **answer)
            seconds += answer["seconds"]
            resident.append(answer["now"] / 1e9)
        figures["step_seconds"] = statistics.median(seconds)
        figures["step_seconds_most"] = max(seconds)
        figures["memory_after_each_canvas_gb"] = resident
        figures["most_memory_gb"] = answer["most"] / 1e9
        peak = ours.ask("peak", 7)
        figures |= {"peak_gops": peak["gops"], "isa": peak["isa"]}
        found = ours.ask("parts", options.steps, options.canvases)
        results.add(section="parts", **found)
    work = operations(config)
    figures["share_blended"] = found["share_blended"]
    figures["step_share_of_peak"] = sum(work.values()) / figures["step_seconds"] / peak["gops"]
    figures["parts"] = {
        part: {
            "seconds": spent,
            "share_of_step": spent / found["step"],
            "share_of_peak": work[part] / spent / peak["gops"] if part in work else None,
        }
        for part, spent in sorted(found["parts"].items(), key=lambda item: -item[1])
    }
    return figures


def restart(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """From a process's begin to its first step, without, while and with a packed copy; and two processes with one."""
    if options.directory is None:
        raise SystemExit("restart: needs a directory; benchmarks/make_26b.py writes one")
    figures: dict[str, Any] = {"layers": ModelConfig.read(options.directory / "config.json").num_layers}
    with tempfile.TemporaryDirectory(dir=options.directory.parent) as cache:

        def start(name: str, side: str, cold: bool) -> Worker:
            if cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            worker = Worker(side, options.directory, options.peer, cache)
            loaded, steps = worker.loaded, worker.ask("steps", options.steps, 0)
            found = {
                "process_seconds": worker.started,
                "load_seconds": loaded["loaded"],
                "first_step_seconds": steps["first"],
                "step_seconds": statistics.median(steps["seconds"]),
                "most_gb": steps["most"] / 1e9,
            }
            results.add(section=name, **found)
            for figure, value in found.items():
                figures.setdefault(f"{name}_{figure}", []).append(value)
            return worker

        start("files", SIDES[0], True).close()
        start("keeping", "keeping", True).close()
        figures["copy_gb"] = sum(path.stat().st_size for path in Path(cache).iterdir()) / 1e9
        for _ in range(options.rounds):
            start("cold", SIDES[0], True).close()
            start("warm", SIDES[0], False).close()
        both = [start(name, SIDES[0], False) for name in ("one", "beside_it")]
        shares = [worker.ask("shared") for worker in both]
        for kind in ("own", "files", "share"):
            figures[f"two_processes_{kind}_gb"] = [share[kind] / 1e9 for share in shares]
        for worker in both:
            worker.close()
    return figures


def operations(config: ModelConfig) -> dict[str, float]:
    """10^9 operations of a step by part, a multiplication and its addition being two; attention itself left out."""
    sizes, length = config.parameters(), config.canvas_length
    weights = {
        "experts": sizes["experts"] * config.top_k_experts / config.num_experts,
        "attention projections": sizes["attention"],
        "dense MLP": sizes["dense MLP"],
        "vocabulary scores": sizes["embedding"],
        "soft embeddings": sizes["embedding"],
        "self-conditioning": sizes["self-conditioning"],
        "router": sizes["router"],
    }
    return {part: 2 * length * count / 1e9 for part, count in weights.items()}


def _difference(sides: list[Worker]) -> float:
    """How far the two sides' scores are apart, relative to their size: the same network, rounded otherwise."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        found = []
        for side in sides:
            side.ask("scores", f"{folder}/{side.side}.pt")
            found.append(torch.load(f"{folder}/{side.side}.pt"))
    return float((found[0] - found[1]).norm() / found[1].norm())


def summary(mode: str, figures: dict[str, Any]) -> str:
    """Figures as Markdown."""
    plain = {name: value for name, value in figures.items() if name != "parts"}
    lines = [f"# {mode}", "", "Random weights at the 26B's sizes; uniform routing, no unlikely words.", ""]
    lines += ["| figure | value |", "|---|---|", *(f"| {name} | {_told(value)} |" for name, value in plain.items())]
    if "parts" in figures:
        lines += ["", "| part of a step | seconds | of the step | of the peak |", "|---|---|---|---|"]
        for part, row in figures["parts"].items():
            peak = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
            lines.append(f"| {part} | {row['seconds']:.3f} | {row['share_of_step']:.1%} | {peak} |")
    return "\n".join(lines)


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


MODES = {"layers6": layers6, "encode": encode, "whole": whole, "restart": restart}


def main() -> None:
    """Runs one mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--peer", choices=["bfloat16", "float32"], default="bfloat16", help="type of transformers")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="of a canvas; the first is not counted")
    parser.add_argument("--canvases", type=int, default=4, help="of `whole`")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt, for `encode`")
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: needs at least 2, since the first is not counted")
    config = {key: value for key, value in vars(options).items() if key not in ("directory", "out")}
    results = Results(f"cpu-step-{options.mode}", config, options.out)
    figures = MODES[options.mode](results, options)
    told = summary(options.mode, figures)
    sys.stdout.write(told + "\n" + results.close(told, figures) + "\n")


if __name__ == "__main__":
    main()
