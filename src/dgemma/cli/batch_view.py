"""How far a batch is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from .failures import one_line
from .terminal import is_terminal, say

if TYPE_CHECKING:
    from ..batch import Progress, Summary

EVERY = 30.0  # seconds between two lines where stderr is no terminal


class View:
    """Shows reports of a run on stderr. Used as a context.

    Args:
        price: of an hour, or None.
        quiet: show nothing but how it ended early.
    """

    def __init__(self, price: float | None, *, quiet: bool):
        self._price, self._quiet = price, quiet
        self._bar: Any = None
        self._task: Any = None
        self._last: Progress | None = None
        self._said = time.monotonic()

    def __enter__(self) -> View:
        if not self._quiet and is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[words]}"))
            self._bar = Progress(
                *columns, console=Console(stderr=True), transient=True, refresh_per_second=5, redirect_stdout=False
            )
            self._task = self._bar.add_task("starting", total=None, words="")
            self._bar.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """One report."""
        before, self._last = self._last, progress
        if self._quiet:
            return
        if self._bar is not None:
            done = progress.done + progress.failed if progress.stage != "checking" else progress.lines
            total = None if progress.stage == "checking" else progress.total
            words = " · ".join(words_of(progress, self._price))
            self._bar.update(self._task, description=progress.stage, completed=done, total=total, words=words)
        else:
            fresh = (before is None or before.stage != progress.stage) and progress.stage in ("loading", "running")
            if fresh or time.monotonic() - self._said >= EVERY:
                self._say(progress)

    def stopped(self, *, resumable: bool) -> None:
        """Says what an interrupted run leaves."""
        self.__exit__()
        if self._last is not None:
            done = self._last.done + self._last.failed
            rest = "; the same command goes on from there" if resumable else ""
            say(f"stopped: {done:,}{_of(self._last.total)} lines are done{rest}")

    def ended(self, summary: Summary) -> None:
        """Says what a run has come to."""
        words = [f"{summary.done:,}{_of(summary.total)} lines answered"]
        if summary.failed:
            words.append(f"{summary.failed:,} failed" + (f" ({summary.errors})" if summary.errors else ""))
        if summary.resumed:
            words.append(f"{summary.resumed:,} of them before this start")
        if summary.mended:
            words.append(f"{summary.mended:,} torn lines mended")
        say(one_line(" · ".join([*words, *_pace(summary, self._price), f"{_time(summary.seconds)}"])))

    def _say(self, progress: Progress) -> None:
        self._said = time.monotonic()
        say(one_line(f"{progress.stage}: {' · '.join(words_of(progress, self._price))}"))


def words_of(progress: Progress, price: float | None) -> list[str]:
    """The figures of a report."""
    if progress.stage == "checking":
        return [f"{progress.lines:,} lines", f"{progress.failed:,} failed"]
    words = [f"{progress.done:,}{_of(progress.total)} done", f"{progress.failed:,} failed"]
    words += _pace(progress, price)
    if progress.stage == "running" and progress.seconds_left is not None:
        words.append(f"{_time(progress.seconds_left)} left")
    return words


def _pace(progress: Progress, price: float | None) -> list[str]:
    words = []
    if progress.tokens:
        words.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        if progress.forwards:
            words.append(f"{progress.tokens_per_forward:.1f} tokens/forward")
    if price is not None:
        words.append(f"cost {price * progress.seconds / 3600:,.2f}")
    return words


def _of(total: int | None) -> str:
    return "" if total is None else f" of {total:,}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
