"""What a batch run is asked for, and what it says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..params import SamplingParams

FORMATS = ("auto", "openai", "rows")
STREAM = "-"  # stdin, stdout


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """A batch run: what is read, what is asked, where the answers go.

    Fields:
        source: requests: JSON lines (`.gz` and `.zst` by name) or `.parquet`; "-" is stdin.
        target: answers, in the same kinds of files; "-" is stdout.
        errors: lines that have no answer, as JSON lines; None for `TARGET.errors.jsonl` (stdout beside stdout).
        format: "openai" lines (`custom_id`, `method`, `url`, `body`), "rows" with a prompt column, or "auto".
        prompt_column: of rows; None for the first of prompt, question, text, messages that is there.
        template: makes the prompt of a row: `{column}` stands for its value, `{{` and `}}` for braces.
        system: a system message for rows.
        think, raw: as `Model.submit` takes them, for rows.
        column_prefix: in front of the names of the columns that answers add to rows.
        params: settings for what a request leaves open. Its seed is the run's: each request's own follows from it and
            from the `custom_id` (the line's number where there is none). None is 0.
        model: the name that requests have to give; any_model: whether they may give any.
        url: the one endpoint that requests may name; None for all.
        shard: (i, n): only each n-th line, beginning at line i, from 1.
        restart: whether what an earlier run has written is thrown away.
        ahead: answers under way at most; None for four times what runs at once.
        sync_seconds: how much work a power failure may undo.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    source: str | Path
    target: str | Path
    errors: str | Path | None = None
    format: str = "auto"
    prompt_column: str | None = None
    template: str | None = None
    system: str | None = None
    think: bool = False
    raw: bool = False
    column_prefix: str = ""
    params: SamplingParams = field(default_factory=SamplingParams)
    model: str = "demo"
    any_model: bool = False
    url: str | None = None
    shard: tuple[int, int] | None = None
    restart: bool = False
    ahead: int | None = None
    sync_seconds: float = 2.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format: {self.format!r} is not one of {', '.join(FORMATS)}")
        for name in ("source", "target", "errors"):
            value = getattr(self, name)
            if value is not None and (not str(value).strip() or "\0" in str(value)):
                raise ConfigError(f"{name}: {str(value)!r} names no file")
        if self.errors is not None and str(self.errors) == STREAM:
            raise ConfigError("errors: needs a file; without one they go to stdout where the answers do")
        if self.template is not None and self.prompt_column is not None:
            raise ConfigError("template: names its own columns; drop prompt_column")
        if self.raw and (self.system is not None or self.think):
            name = "think" if self.think else "system"
            raise ConfigError(f"{name}: goes through the chat template, which raw leaves out; drop one of them")
        if self.shard is not None:
            number, count = self.shard
            if not 1 <= number <= count:
                raise ConfigError(f"shard: {number}/{count} is not I/N with I from 1 to N")
        if self.ahead is not None and self.ahead < 1:
            raise ConfigError(f"ahead: {self.ahead} is not a number of at least 1")
        if not 0 < self.sync_seconds < math.inf:
            raise ConfigError(f"sync_seconds: {self.sync_seconds} is not a time above 0")

    @property
    def seed(self) -> int:
        """The run's."""
        return self.params.seed or 0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is. Counts are of this run's share of the lines, and of all its starts together.

    Fields:
        stage: "checking", "loading", "running", "writing" or "done".
        lines: requests in the input that are known so far, good and bad; total: all of them, or None while unknown.
        done, failed: lines with an answer, lines in the errors file.
        resumed: of both, those that were there when this start began; fresh: those since its first request.
        tokens, prompt_tokens, forwards: given, read, and denoising steps, since this start.
        seconds: since this start; running_seconds: since its first request.
    """

    stage: str
    lines: int
    total: int | None
    done: int
    failed: int
    resumed: int
    fresh: int
    tokens: int
    prompt_tokens: int
    forwards: int
    seconds: float
    running_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that users get."""
        return self.tokens / self.running_seconds if self.running_seconds > 0 else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """0 where nothing was denoised."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None while nobody can tell."""
        if self.total is None or self.fresh <= 0 or self.running_seconds <= 0:
            return None
        return max(0, self.total - self.done - self.failed) * self.running_seconds / self.fresh


@dataclass(frozen=True, kw_only=True)
class Summary(Progress):
    """What a run came to.

    Fields:
        target, errors: where answers and failed lines are; None for stdout.
        stopped: whether it was told to stop before its end.
        mended: lines of the target that could not be read and were dropped at the start, to be answered again.
    """

    target: Path | None
    errors: Path | None
    stopped: bool
    mended: int
