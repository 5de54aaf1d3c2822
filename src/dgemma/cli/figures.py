"""The figures of a run in words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..events import Result, Stats

UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def as_json(result: Result) -> dict[str, Any]:
    """The object that `--json` prints."""
    stats = {name: _finite(value) for name, value in dataclasses.asdict(result.stats).items()}
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": result.seed,
        "thoughts": result.thoughts,
        "stats": stats,
    }


def brief(result: Result) -> str:
    """One line: what was made, in how many steps, how fast, and the seed that makes it again."""
    stats = result.stats
    parts = [_many(stats.new_tokens, "token")]
    if stats.steps_per_canvas:
        parts.append(f"{_steps(stats)} steps")
        parts.append(f"{stats.tokens_per_forward:.1f} tokens/forward")
    parts.append(f"{stats.seconds:.1f} s")
    if 0 < stats.tokens_per_second < math.inf:
        parts.append(f"{stats.tokens_per_second:,.0f} tokens/s")
    parts.append(f"seed {result.seed}")
    if result.finish_reason != "stop":
        parts.append("cut off by --max-new-tokens" if result.finish_reason == "length" else result.finish_reason)
    return " · ".join(parts)


def table(result: Result) -> list[str]:
    """One line a figure, for `--stats`."""
    stats = result.stats
    first = stats.seconds_to_first_text
    rows = {
        "prompt": f"{_many(stats.prompt_tokens, 'token')}, read at {stats.encode_tokens_per_second:,.0f} tokens/s",
        "answer": f"{_many(stats.new_tokens, 'token')}, ended by {result.finish_reason}",
        "steps": f"{_steps(stats)} in {_many(len(stats.steps_per_canvas), 'canvas', 'canvases')}, "
        f"{stats.seconds_per_step * 1000:,.1f} ms each",
        "per forward": f"{stats.tokens_per_forward:.2f} tokens",
        "speed": f"{stats.tokens_per_second:,.1f} tokens/s",
        "time": f"{stats.seconds:.2f} s" + ("" if first is None else f", first text after {first:.2f} s"),
        "peak memory": bytes_in_words(stats.peak_memory_bytes),
        "seed": str(result.seed),
    }
    if not stats.steps_per_canvas:
        del rows["steps"], rows["per forward"]
    return [f"{name:<14}{value}" for name, value in rows.items()]


def bytes_in_words(count: float) -> str:
    """`count` bytes with a unit that suits it."""
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} bytes"


def _steps(stats: Stats) -> str:
    """`12 + 9`, or the sum where that would be long."""
    steps = stats.steps_per_canvas
    return " + ".join(map(str, steps)) if len(steps) <= 4 else str(sum(steps))


def _many(count: int, one: str, more: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
