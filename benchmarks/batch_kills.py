"""A batch that is killed again and again: what is in the files in the end.

    python benchmarks/batch_kills.py [--kills 50] [--requests 2000] [--model fake|demo] [--suffix jsonl]

Starts `dgemma batch`, kills it with SIGKILL at a random moment, starts it again, so many times. Then lets it end, and
compares with a run that nobody disturbed: the same custom_ids, each once, and the same texts. The fake model answers
at once and is there for the sake of the files; the demo model shows that texts do not change. The last line of output
is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import Results

from batch import requests, write

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "batch" / "fakes.py"


def command(model: str, source: Path, target: Path) -> list[str]:
    """The command line."""
    program = [str(FAKE)] if model == "fake" else ["-m", "dgemma"]
    return [sys.executable, *program, "batch", str(source), str(target), "--quiet", "--max-new-tokens", "48"]


def environment(model: str, delay: float) -> dict[str, str]:
    """For the command; the fake model takes `delay` seconds a step, and is in one process alone."""
    workers = {"DGEMMA_WORKERS": "1"} if model == "fake" else {}
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "FAKE_DELAY": str(delay), **workers}


def size(path: Path) -> int:
    """Bytes; 0 if it is missing."""
    return path.stat().st_size if path.exists() else 0


def texts(path: Path) -> list[tuple[str, str]]:
    """(custom_id, text) of every line."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines: list[dict[str, Any]] = [json.loads(line) for line in data.splitlines()]
    return [(line["custom_id"], line["response"]["body"]["choices"][0]["message"]["content"]) for line in lines]


def main() -> None:
    """Kills, resumes, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", choices=["fake", "demo"], default="fake")
    parser.add_argument("--suffix", choices=["jsonl", "jsonl.gz"], default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    results = Results("batch-kills", {**vars(args), "out": None}, args.out)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write(folder / "in.jsonl", requests(args.requests))
        whole, target = folder / f"whole.{args.suffix}", folder / f"out.{args.suffix}"
        started = time.perf_counter()
        subprocess.run(command(args.model, source, whole), check=True, env=environment(args.model, 0.01))
        results.add(section="undisturbed", seconds=time.perf_counter() - started, bytes=size(whole))
        kills = 0
        while kills < args.kills:
            # Each start gets its share of what is missing: after so many bytes, or at any moment of the way there.
            share = (size(whole) - size(target)) // (args.kills - kills + 1)
            process = subprocess.Popen(command(args.model, source, target), env=environment(args.model, 0.01))
            mark, waited = size(target) + rng.randrange(1, max(2, 2 * share)), time.perf_counter()
            early = rng.random() * 4 if rng.random() < 0.2 else None
            while process.poll() is None and size(target) < mark:
                if early is not None and time.perf_counter() - waited > early:
                    break
                time.sleep(0.001)
            process.kill()
            if process.wait() == 0:
                break  # it was done
            kills += 1
            data = target.read_bytes() if target.exists() else b""
            torn = bool(data) and args.suffix == "jsonl" and not data.endswith(b"\n")
            results.add(section="kill", number=kills, bytes=len(data), torn=torn)
            sys.stderr.write(f"kill {kills}: {len(data):,} of {size(whole):,} bytes{', torn' if torn else ''}\n")
        subprocess.run(command(args.model, source, target), check=True, env=environment(args.model, 0.0))
        ours, theirs = texts(target), texts(whole)
    counts = Counter(custom_id for custom_id, _ in ours)
    figures = {
        "kills": kills,
        "lines": len(ours),
        "duplicates": sum(count - 1 for count in counts.values()),
        "missing": len(dict(theirs).keys() - counts.keys()),
        "different": sum(dict(ours).get(custom_id) != text for custom_id, text in theirs),
    }
    rows = "\n".join(f"- {name}: {value}" for name, value in figures.items())
    sys.stdout.write(results.close(f"# {kills} kills of a batch of {args.requests:,}\n\n{rows}\n", figures) + "\n")
    if len(ours) != args.requests or figures["duplicates"] or figures["missing"] or figures["different"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
