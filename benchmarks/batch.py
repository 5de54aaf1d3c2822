"""Mass generation with the demo model, beside a loop of `generate` and beside transformers in static batches.

    python benchmarks/batch.py [--requests 20000] [--few 480] [--rounds 3] [--workers N] [--max-new-tokens 32]

Each round answers its share of the requests by `dgemma.batch.run`, from file to file: checked, loaded, written and
synced; then a few of the same by the other two ways, in the same order, with all threads. Ratios are of requests a
second, the median of the rounds. transformers gets batches as they come, padded on the left, its canvas as long as
ours. The texts of the loop are compared with those of the batch. Memory is that of all processes, every second while a
batch runs. Raw records go under benchmarks/results/; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import Results

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.batch import BatchSettings, Summary, run
from dgemma.tasks import FAMILIES, held_out

SHORT = ("sorting", "records", "calendar")
CANVAS = 32  # a canvas has a multiple of so many tokens


def requests(count: int) -> list[dict[str, Any]]:
    """Held-out prompts of four families in turn, as lines of a batch."""
    each = -(-count // len(SHORT))
    examples = [e for group in zip(*(held_out(f, each, 0) for f in SHORT), strict=True) for e in group][:count]
    return [
        {
            "custom_id": f"request-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "demo", "messages": [{"role": "user", "content": e.prompt}]},
        }
        for n, e in enumerate(examples)
    ]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """A file of requests."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def in_batch(
    loaders: list[Any], lines: list[dict[str, Any]], params: SamplingParams
) -> tuple[dict[str, Any], float, Summary]:
    """Answers by custom_id, seconds, and what the run says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = write(Path(folder) / "in.jsonl", lines), Path(folder) / "out.jsonl"
        started = time.perf_counter()
        summary = run(BatchSettings(source=source, target=target, params=params), lambda: loaders)
        seconds = time.perf_counter() - started
        assert summary.done == len(lines), summary
        answers = map(json.loads, target.read_text().splitlines())
        return {answer["custom_id"]: answer["response"]["body"] for answer in answers}, seconds, summary


def in_a_loop(
    model: dgemma.Model, lines: list[dict[str, Any]], params: SamplingParams, bodies: dict[str, Any]
) -> tuple[int, float]:
    """Tokens and seconds of `generate`, one request after another; checks that the texts are the batch's."""
    from dataclasses import replace

    from dgemma.batch.form import seed_of

    tokens, started = 0, time.perf_counter()
    for line in lines:
        seed = seed_of(0, f"id {line['custom_id']}")
        result = model.generate(line["body"]["messages"], replace(params, seed=seed))
        assert result.text == bodies[line["custom_id"]]["choices"][0]["message"]["content"], line["custom_id"]
        tokens += len(result.tokens)
    return tokens, time.perf_counter() - started


def in_static_batches(
    reference: Any, model: dgemma.Model, lines: list[dict[str, Any]], size: int, most: int
) -> tuple[int, float]:
    """The same by transformers' `generate`, `size` requests at once: the next ones begin when the last one is done."""
    tokens, started = 0, time.perf_counter()
    pad = model.generation.pad_token_id or 0
    for start in range(0, len(lines), size):
        prompts = [model.tokens_of(line["body"]["messages"]) for line in lines[start : start + size]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = reference.generate(ids, attention_mask=mask, max_new_tokens=most)
        for row in getattr(out, "sequences", out)[:, width:].tolist():
            ends = [place for place, token in enumerate(row) if token in model.end_token_ids]
            tokens += min([*ends, most])
    return tokens, time.perf_counter() - started


class Memory:
    """Resident bytes of this process and its children, every second from `start` to `stop`."""

    def __init__(self, results: Results):
        self.bytes: list[int] = []
        self._results = results
        self._over: threading.Event | None = None

    def start(self, number: int) -> None:
        """Begins to look."""
        self._over = threading.Event()
        threading.Thread(target=self._watch, args=(self._over, number), daemon=True).start()

    def stop(self) -> None:
        """Ends it."""
        assert self._over is not None
        self._over.set()

    def _watch(self, over: threading.Event, number: int) -> None:
        begun = time.perf_counter()
        while not over.wait(1.0):
            total = 0
            for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
                with contextlib.suppress(OSError):
                    total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
            self.bytes.append(total)
            self._results.add(section="memory", round=number, seconds=time.perf_counter() - begun, bytes=total)


def right(lines: list[dict[str, Any]], bodies: dict[str, Any], count: int) -> float:
    """Exact match of the first answers, so that speed is not bought with nonsense."""
    each = -(-count // len(SHORT))
    examples = [e for group in zip(*(held_out(f, each, 0) for f in SHORT), strict=True) for e in group][:count]
    families = [SHORT[n % len(SHORT)] for n in range(count)]
    texts = [bodies[line["custom_id"]]["choices"][0]["message"]["content"] for line in lines[:count]]
    checks = zip(families, examples, texts, strict=True)
    return sum(FAMILIES[family].check(example, text) for family, example, text in checks) / count


def main() -> None:
    """Runs all rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--few", type=int, default=480, help="requests of the slower ways")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=torch.get_num_threads())
    parser.add_argument("--static-batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--skip", choices=["loop", "transformers"], action="append", default=[])
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    results = Results("batch", {**vars(args), "out": None}, args.out)
    params = SamplingParams(max_new_tokens=args.max_new_tokens)
    threads = max(1, torch.get_num_threads() // args.workers)
    load = partial(dgemma.load, "demo", threads=threads, engine=EngineSettings(max_batch=args.max_batch))
    loaders = [load] * args.workers
    model = loop = dgemma.load("demo", engine=EngineSettings(max_batch=1))
    reference: Any = None
    if "transformers" not in args.skip:
        warnings.filterwarnings("ignore")
        from transformers import DiffusionGemmaForBlockDiffusion

        reference = DiffusionGemmaForBlockDiffusion.from_pretrained(model.directory, dtype=torch.float32).eval()
        reference.config.canvas_length = min(256, -(-args.max_new_tokens // CANVAS) * CANVAS)
    lines = requests(args.requests)
    size, few = args.requests // args.rounds, args.few // args.rounds
    memory = Memory(results)
    rates: dict[str, list[float]] = {"batch": [], "loop": [], "transformers": []}
    matches = []
    for number in range(args.rounds):
        own = lines[number * size : (number + 1) * size]
        memory.start(number)
        bodies, seconds, summary = in_batch(loaders, own, params)
        memory.stop()
        given = {"batch": (summary.tokens, seconds, len(own))}
        if not number:
            matches.append(right(own, bodies, min(size, 2000)))
        if "loop" not in args.skip:
            given["loop"] = (*in_a_loop(loop, own[:few], params, bodies), few)
        if reference is not None:
            most = args.max_new_tokens
            given["transformers"] = (*in_static_batches(reference, model, own[:few], args.static_batch, most), few)
        for way, (tokens, spent, count) in given.items():
            rates[way].append(count / spent)
            results.add(section="throughput", round=number, way=way, requests=count, tokens=tokens, seconds=spent)
            sys.stderr.write(f"round {number}, {way}: {count / spent:.1f} requests/s, {tokens / spent:.0f} tokens/s\n")
    figures: dict[str, Any] = {
        f"{way}_requests_per_second": statistics.median(rate) for way, rate in rates.items() if rate
    }
    for way in ("loop", "transformers"):
        if rates[way]:
            pairs = zip(rates["batch"], rates[way], strict=True)
            figures[f"ratio_to_{way}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    tenth = max(1, len(memory.bytes) // 10)
    figures |= {
        "exact_match": matches[0],
        "memory_mb_after_a_tenth": memory.bytes[tenth - 1] / 1e6 if memory.bytes else None,
        "memory_mb_at_the_end": memory.bytes[-1] / 1e6 if memory.bytes else None,
        "memory_mb_at_most": max(memory.bytes, default=0) / 1e6,
    }
    rows = "\n".join(f"- {name}: {value:,.2f}" for name, value in figures.items() if value is not None)
    about = (
        f"{args.requests:,} requests, {args.max_new_tokens} tokens at most; "
        f"{args.workers} workers, {args.max_batch} requests at once in each"
    )
    sys.stdout.write(results.close(f"# Mass generation with the demo model\n\n{about}.\n\n{rows}\n", figures) + "\n")


if __name__ == "__main__":
    main()
