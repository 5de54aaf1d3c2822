"""Exact match on held-out prompts: every reply is checked by its task's own verifier."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..api import Model
from ..errors import RequestError
from ..params import SamplingParams
from ..tasks import FAMILIES, Example, held_out

MAX_NEW_TOKENS = 512  # the longest stories take about 320


@dataclass(frozen=True, kw_only=True)
class Record:
    """One prompt's outcome; `seconds` is the time of the steps that it took part in, together with others."""

    family: str
    prompt: str
    reply: str
    right: bool
    tokens: int
    steps: int
    canvases: int
    seconds: float
    finish_reason: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """One family's outcome. `tokens_per_forward` is all tokens over all steps (1 in autoregressive mode, which has no
    steps); `tokens_per_second` is all tokens over the time that the family took.
    """

    family: str
    prompts: int
    right: int
    exact_match: float
    tokens_per_forward: float
    steps_per_canvas: float
    tokens_per_second: float
    empty: int


def families(names: tuple[str, ...]) -> list[str]:
    """The families that names stand for; none means every scored one.

    Raises:
        RequestError: a name is unknown.
    """
    for name in names:
        if name not in FAMILIES:
            raise RequestError(f"TASKS: {name!r} is unknown (known: {', '.join(FAMILIES)})")
    return list(names) or [name for name, task in FAMILIES.items() if task.scored]


def run(
    model: Model,
    names: list[str],
    params: SamplingParams,
    *,
    limit: int,
    seed: int,
    report: Callable[[Record], None] = lambda record: None,
) -> tuple[list[Record], list[Score]]:
    """Answers `limit` held-out prompts a family, as many at once as the model's engine takes, and scores them.

    Each prompt has a seed of its own that follows from `seed`, so the run is repeatable, in any batch.
    """
    if params.max_new_tokens is None:
        params = replace(params, max_new_tokens=MAX_NEW_TOKENS)
    records, scores = [], []
    for name in names:
        started, own = time.perf_counter(), []
        for record in _answers(model, held_out(name, limit, seed), params, seed):
            own.append(record)
            report(record)
        scores.append(score(name, own, time.perf_counter() - started))
        records += own
    return records, scores


def _answers(model: Model, examples: list[Example], params: SamplingParams, seed: int) -> Iterator[Record]:
    each = [replace(params, seed=seed * 1_000_003 + number) for number in range(len(examples))]
    prompts = [example.prompt for example in examples]
    for example, result in zip(examples, model.map(zip(prompts, each, strict=True)), strict=True):
        stats = result.stats
        yield Record(
            family=example.family,
            prompt=example.prompt,
            reply=result.text,
            right=FAMILIES[example.family].check(example, result.text),
            tokens=stats.new_tokens,
            steps=sum(stats.steps_per_canvas),
            canvases=len(stats.steps_per_canvas),
            seconds=round(stats.seconds, 4),
            finish_reason=result.finish_reason,
            seed=result.seed,
        )


def score(family: str, records: list[Record], seconds: float) -> Score:
    """Sums up one family's records, which took so long together."""
    tokens, steps = sum(r.tokens for r in records), sum(r.steps for r in records)
    right = sum(r.right for r in records)
    return Score(
        family=family,
        prompts=len(records),
        right=right,
        exact_match=right / max(1, len(records)),
        tokens_per_forward=tokens / steps if steps else 1.0,
        steps_per_canvas=steps / max(1, sum(r.canvases for r in records)),
        tokens_per_second=tokens / max(1e-9, seconds),
        empty=sum(not r.reply.strip() for r in records),
    )


def as_dict(scores: list[Score]) -> dict[str, Any]:
    """Scores as plain values, with the averages over families."""
    count = max(1, len(scores))
    return {
        "families": [asdict(s) for s in scores],
        "exact_match": sum(s.exact_match for s in scores) / count,
        "tokens_per_forward": sum(s.tokens_per_forward for s in scores) / count,
    }
