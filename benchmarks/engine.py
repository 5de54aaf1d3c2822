"""The engine on the demo model: what batching, block diffusion, prefix reuse and early text are worth.

    python benchmarks/engine.py [SECTION ...]     batch, modes, transformers, turns, early; all if none is named

Every ratio is taken in one run on one machine, alternating, as the median of several rounds. Tokens are those that a
user gets. Raw records are written under benchmarks/results/; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import Results

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.tasks import FAMILIES, held_out

SCORED = ("sums", "sorting", "sudoku", "records", "calendar")
REQUESTS = 16
Timed = tuple[list[dgemma.Result], float]


def requests(count: int, seed: int = 0, **settings: Any) -> list[tuple[str, SamplingParams]]:
    """Held-out prompts of all scored families in turn."""
    examples = [example for group in zip(*(held_out(f, count, seed) for f in SCORED), strict=True) for example in group]
    return [(e.prompt, SamplingParams(seed=n, max_new_tokens=128, **settings)) for n, e in enumerate(examples[:count])]


def timed(model: dgemma.Model, work: list[tuple[Any, SamplingParams]], *, together: bool) -> Timed:
    """Answers and seconds, all at once or one after another."""
    started = time.perf_counter()
    results = list(model.map(work)) if together else [model.generate(prompt, params) for prompt, params in work]
    return results, time.perf_counter() - started


def tokens(results: list[dgemma.Result]) -> int:
    """Tokens that users got."""
    return sum(len(result.tokens) for result in results)


BATCHES: dict[str, dict[str, Any]] = {
    "canvas of 128": {},
    "canvas of 64": {"canvas_length": 64, "stop_at_end": True},
    "canvas of 32": {"canvas_length": 32, "stop_at_end": True},
    "autoregressive": {"mode": "autoregressive"},
}


def batch(results: Results, rounds: int) -> dict[str, Any]:
    """16 requests at once against the same 16 one after another. A forward over more positions leaves less idle, so
    there is the less to win the longer the canvas is.
    """
    model, figures = dgemma.load("demo"), {}
    for name, settings in BATCHES.items():
        section, work = f"batch, {name}", requests(REQUESTS, **settings)
        timed(model, work, together=True)
        for number in range(rounds):
            alone, alone_seconds = timed(model, work, together=False)
            together, together_seconds = timed(model, work, together=True)
            assert [r.tokens for r in alone] == [r.tokens for r in together]
            for way, answers, seconds in (
                ("one by one", alone, alone_seconds),
                ("together", together, together_seconds),
            ):
                results.add(section=section, round=number, way=way, tokens=tokens(answers), seconds=seconds)
        figures[name] = _rates(results, section, "together", "one by one")
    return figures


def modes(results: Results, rounds: int) -> dict[str, Any]:
    """Block diffusion against autoregressive mode: the same weights, engine, prompts; alone and 16 at once."""
    model, figures = dgemma.load("demo"), {}
    for together in (False, True):
        section = f"modes, {'16 at once' if together else 'alone'}"
        for family in SCORED:
            examples = held_out(family, REQUESTS, 1)
            for number in range(rounds):
                for mode in dgemma.params.MODES:
                    work = [(e.prompt, _params(n, mode)) for n, e in enumerate(examples)]
                    answers, seconds = timed(model, work, together=together)
                    right = sum(FAMILIES[family].check(e, a.text) for e, a in zip(examples, answers, strict=True))
                    results.add(
                        section=section,
                        family=family,
                        round=number,
                        way=mode,
                        tokens=tokens(answers),
                        seconds=seconds,
                        right=right,
                        prompts=len(examples),
                    )
        figures[section] = _rates(results, section, "diffusion", "autoregressive")
    return figures


def _params(seed: int, mode: str) -> SamplingParams:
    """Diffusion with canvases for short answers and a stop at the end token; autoregressive mode without noise."""
    if mode == "autoregressive":
        return SamplingParams(seed=seed, max_new_tokens=128, mode=mode, temperature=0.0)
    return SamplingParams(seed=seed, max_new_tokens=128, canvas_length=64, stop_at_end=True)


def transformers(results: Results, rounds: int) -> dict[str, Any]:
    """One request beside transformers' own `generate` on the same checkpoint, at the full canvas of 256."""
    warnings.filterwarnings("ignore")
    from transformers import DiffusionGemmaForBlockDiffusion

    model = dgemma.load("demo")
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(model.directory, dtype=torch.float32).eval()
    work = requests(REQUESTS)
    for number in range(rounds):
        answers, seconds = timed(model, work, together=False)
        results.add(section="transformers", round=number, way="dgemma", tokens=tokens(answers), seconds=seconds)
        given, started = 0, time.perf_counter()
        for prompt, params in work:
            ids = torch.tensor([model.tokens_of(prompt)])
            torch.manual_seed(params.seed or 0)
            out = reference.generate(ids, max_new_tokens=params.max_new_tokens)
            fresh = getattr(out, "sequences", out)[0, ids.shape[1] :].tolist()
            ends = [place for place, token in enumerate(fresh) if token in model.end_token_ids]
            given += min([*ends, params.max_new_tokens or 0])
        seconds = time.perf_counter() - started
        results.add(section="transformers", round=number, way="transformers", tokens=given, seconds=seconds)
    return _rates(results, "transformers", "dgemma", "transformers")


def turns(results: Results, rounds: int) -> dict[str, Any]:
    """Time to first text of the second turn of a long chat, with and without reuse of what is encoded."""
    models = {
        way: dgemma.load("demo", engine=EngineSettings(prefix_reuse=way == "with reuse", max_batch=1))
        for way in ("with reuse", "without reuse")
    }
    story = held_out("stories", 1, 0)[0].answer
    long = [
        {"role": role, "content": content}
        for n in range(22)
        for role, content in (("user", f"Tell me story {n}."), ("assistant", story))
    ]
    long.append({"role": "user", "content": "What is 25 + 211?"})
    for number in range(rounds):
        for way, model in models.items():
            few = {"max_new_tokens": 64, "max_denoising_steps": 4}  # twice what its answers take when the chat is short
            first = model.generate(long, SamplingParams(seed=1, **few))
            again = [*long, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And 7 + 1?"}]
            started = time.perf_counter()
            seconds = None
            for event in model.submit(again, SamplingParams(seed=2, **few)):
                if seconds is None and isinstance(event, dgemma.Commit):
                    seconds = time.perf_counter() - started
            prompt = len(model.tokens_of(again))
            results.add(section="turns", round=number, way=way, tokens=1, seconds=seconds, prompt_tokens=prompt)
    return _rates(results, "turns", "with reuse", "without reuse")


def early(results: Results, rounds: int) -> dict[str, Any]:
    """Exact match and time to first text with early text off, safe and eager, one request after another."""
    model, figures = dgemma.load("demo"), {}
    for setting in dgemma.params.EARLY_TEXT:
        for family in (*SCORED, "stories"):
            examples = held_out(family, (3 if family == "stories" else 15) * rounds, 2)
            most = 512 if family == "stories" else 128
            work = [
                (e.prompt, SamplingParams(seed=n, max_new_tokens=most, early_text=setting))
                for n, e in enumerate(examples)
            ]
            answers, seconds = timed(model, work, together=False)
            right = sum(FAMILIES[family].check(e, a.text) for e, a in zip(examples, answers, strict=True))
            first = statistics.median(a.stats.seconds_to_first_text or a.stats.seconds for a in answers)
            results.add(
                section="early",
                family=family,
                way=setting,
                tokens=tokens(answers),
                seconds=seconds,
                right=right,
                prompts=len(examples),
                first_text=first,
            )
        own = [r for r in results.records if r["section"] == "early" and r["way"] == setting]
        scored = [r for r in own if r["family"] != "stories"]
        figures[setting] = {
            "exact_match": sum(r["right"] for r in scored) / sum(r["prompts"] for r in scored),
            "first_text": statistics.median(r["first_text"] for r in scored),
            "first_text_of_stories": own[-1]["first_text"],
            "stories_right": own[-1]["right"] / own[-1]["prompts"],
        }
    return figures


def _rates(results: Results, section: str, fast: str, slow: str) -> dict[str, Any]:
    """Median rates of two ways of one section, and the median of the ratios of their pairs."""
    rates = {
        way: [r["tokens"] / r["seconds"] for r in results.records if r["section"] == section and r["way"] == way]
        for way in (fast, slow)
    }
    ratios = [a / b for a, b in zip(rates[fast], rates[slow], strict=True)]
    return {
        fast: statistics.median(rates[fast]),
        slow: statistics.median(rates[slow]),
        "ratio": statistics.median(ratios),
    }


SECTIONS: dict[str, Callable[[Results, int], dict[str, Any]]] = {
    "batch": batch,
    "modes": modes,
    "transformers": transformers,
    "turns": turns,
    "early": early,
}


def main() -> None:
    """Runs the named sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    args = parser.parse_args()
    results = Results("engine", vars(args) | {"out": None}, args.out)
    figures = {}
    for name in args.sections or SECTIONS:
        figures[name] = SECTIONS[name](results, args.rounds)
        sys.stderr.write(f"{name}: {figures[name]}\n")
    rows = "\n".join(f"- {name}: {figure}" for name, figure in figures.items())
    sys.stdout.write(results.close(f"# The engine on the demo model\n\n{rows}\n", figures) + "\n")


if __name__ == "__main__":
    main()
