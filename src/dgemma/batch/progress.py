"""How far a run is, told a few times a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from .answer import Outcome
from .ledger import Ledger
from .settings import Progress, Summary

PACE = 0.2  # seconds between two reports
Report = Callable[[Progress], None]


class Meter:
    """Counts what a start does.

    Fields:
        lines: read and checked so far; total: of the input, None while nobody knows.
    """

    def __init__(self, ledger: Ledger, report: Report):
        self.ledger = ledger
        self.lines = 0
        self.total: int | None = None
        self._report = report
        self._stage = "checking"
        self._resumed = self._before = ledger.done + ledger.failed
        self._tokens = self._prompt_tokens = self._forwards = 0
        self._begun = self._told = time.monotonic()
        self._running: float | None = None
        self._ran = 0.0

    @property
    def left(self) -> int | None:
        """Lines that are not accounted for."""
        return None if self.total is None else self.total - self.ledger.done - self.ledger.failed

    def stage(self, name: str) -> None:
        """What it does from now on."""
        now = time.monotonic()
        if name == "running":
            self._running, self._before = now, self.ledger.done + self.ledger.failed
        elif self._running is not None and self._stage == "running":
            self._ran = now - self._running
        self._stage = name
        self.tell(at_once=True)

    def count(self, outcome: Outcome) -> None:
        """One more that is done."""
        self._tokens += outcome.tokens
        self._prompt_tokens += outcome.prompt_tokens
        self._forwards += outcome.forwards

    def tell(self, *, at_once: bool = False) -> None:
        """Reports, if it is time again."""
        now = time.monotonic()
        if at_once or now - self._told >= PACE:
            self._told = now
            self._report(self.progress())

    def progress(self) -> Progress:
        """Now."""
        now = time.monotonic()
        total = self.total
        running = 0.0 if self._running is None else now - self._running
        return Progress(
            stage=self._stage,
            lines=self.lines if total is None else total,
            total=total,
            done=self.ledger.done,
            failed=self.ledger.failed,
            resumed=self._resumed,
            fresh=0 if self._running is None else self.ledger.done + self.ledger.failed - self._before,
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            forwards=self._forwards,
            seconds=now - self._begun,
            running_seconds=self._ran or running,
        )

    def summary(self, *, stopped: bool) -> Summary:
        """At the end."""
        if self.ledger.finished:
            self.total = self.ledger.done + self.ledger.failed
        if not stopped:
            self.stage("done")
        paths = self.ledger.paths
        errors = paths.errors if self.ledger.failed else None
        return Summary(
            **asdict(self.progress()),
            target=paths.target,
            errors=errors,
            stopped=stopped,
            mended=self.ledger.mended,
        )
