"""The live canvas: a few rows on stderr that are redrawn in place while the answer above them grows on stdout.

Text that is committed but not yet ended by a newline is held back and drawn as the first part of the canvas, so the
answer reads on without a break and its words stay where they settled. When the run ends the rows vanish and the
whole answer stands on stdout as plain text.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

from ..events import Commit, Draft, Early
from .canvas import Cell, Look, Pieces, Row, caption, cells, columns, window, wrap
from .failures import one_line, warn
from .terminal import in_ascii, is_terminal, size, speaks_unicode, visible, write_answer

PACE = 0.04  # seconds that every draft stays on the screen, however fast the model is
TICK = 0.1  # seconds between looks at the window size and the clock
CLOCK = 0.5  # seconds after which the figures are redrawn although nothing happened

STYLES = {
    Look.WRITTEN: "",
    Look.SETTLED: "bold",
    Look.REVISED: "underline yellow",
    Look.GUESS: "dim",
    Look.LOW: "dim cyan",
    Look.MIDDLE: "dim blue",
    Look.HIGH: "dim blue",
}
Styled = list[tuple[str, str]]  # one row: runs of text and a rich style


class Region:
    """Rows at the bottom of the terminal that can be redrawn and taken away again."""

    def __init__(self, stream: TextIO):
        from rich.console import Console

        self.stream = stream
        self._console = Console(file=io.StringIO(), force_terminal=True, legacy_windows=False, highlight=False)
        self._widths: list[int] = []  # of the rows on the screen
        self._plain = not speaks_unicode(stream)

    def draw(self, rows: list[Styled]) -> None:
        """Puts `rows` in the place of those drawn before; the terminal shows old or new, never something between."""
        width, _ = size(self.stream)
        parts = ["\x1b[?2026h\x1b[?25l", self._home(width)]
        widths = []
        for index, row in enumerate(rows):
            taken = sum(columns(text) for text, _ in row)
            # At the last column the cursor hangs on the character just written: erasing there would take it away.
            parts.append(("\r\n" if index else "") + self._render(row) + ("\x1b[K" if taken < width else ""))
            widths.append(taken)
        parts.append("\x1b[J\x1b[?2026l" if widths and widths[-1] < width else "\x1b[?2026l")
        self._widths = widths
        self._write("".join(parts))

    def erase(self) -> None:
        """Takes the rows away; the cursor stands where they began, and is seen again."""
        self._write(f"{self._home(size(self.stream)[0])}\x1b[J\x1b[?25h" if self._widths else "\x1b[?25h")
        self._widths = []

    def _home(self, width: int) -> str:
        """Back to the first row. Rows wider than a window that has been narrowed since have been broken by it."""
        drawn = sum(max(1, -(-taken // width)) for taken in self._widths)
        return "\r" + (f"\x1b[{drawn - 1}A" if drawn > 1 else "")

    def _render(self, row: Styled) -> str:
        from rich.text import Text

        with self._console.capture() as capture:
            self._console.print(Text.assemble(*row), end="", soft_wrap=True)
        return in_ascii(capture.get()) if self._plain else capture.get()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has gone is no reason to lose the answer
            self.stream.write(text)
            self.stream.flush()


class LiveView:
    """Shows drafts in a `Region` and hands committed text to stdout (unless `quiet`)."""

    def __init__(self, pieces: Pieces, *, quiet: bool = False, pace: float = PACE):
        self.pieces, self.quiet, self.pace = pieces, quiet, pace
        self.hold = sys.stdout.isatty() and not quiet
        self.region = Region(sys.stderr)
        self.held = ""  # committed text since its last newline
        self._early = ""  # certain text of the canvas that is drawn, which shows it among its cells
        self._last = ""  # last character written to stdout
        self._draft: Draft | None = None
        self._content: list[Cell] = []
        self._history: list[float] = []
        self._canvas = 0
        self._size = (0, 0)
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._begun = self._drawn = time.monotonic()
        self._shown = 0.0  # when the last draft was
        self._ticker = threading.Thread(target=self._tick, name="dgemma-live", daemon=True)
        self._showwarning: Any = None

    def __enter__(self) -> LiveView:
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._notice  # type: ignore[assignment]
        self._begun = time.monotonic()
        self._redraw()
        self._ticker.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._done.set()
            self._ticker.join()
        finally:
            warnings.showwarning = self._showwarning
            self.region.erase()
        self._emit(self.held + self._early)
        if self._last not in ("", "\n"):
            self._emit("\n")

    def draft(self, draft: Draft) -> None:
        """Draws the canvas, once the one before has been on the screen for a moment."""
        self._hold()
        with self._lock:
            if draft.canvas != self._canvas:
                self._history.clear()
            self._canvas, self._draft = draft.canvas, draft
            self._history.append(draft.mean_entropy)
            self._content = cells(draft, self.pieces)
            self._redraw()
            self._shown = time.monotonic()

    def early(self, early: Early) -> None:
        """Keeps the words until their canvas is finished."""
        self._early += early.text

    def commit(self, commit: Commit) -> None:
        """Writes what the canvas adds to the answer, up to its last newline; the rest is held."""
        self._hold()
        self.text(self._early + commit.text)
        with self._lock:
            self._early, self._draft, self._content = "", None, []
            self._canvas = commit.canvas + 1
            self._history.clear()
            self._redraw()

    def text(self, text: str) -> None:
        """Adds `text` to the answer."""
        with self._lock:
            self.held += text
            cut = self.held.rfind("\n") + 1 if self.hold else len(self.held)
            if cut:
                self.region.erase()
                self._emit(self.held[:cut])
                self.held = self.held[cut:]

    def _hold(self) -> None:
        """Waits until the last draft has been seen; a model that takes its time is not slowed down."""
        time.sleep(max(0.0, self._shown + self.pace - time.monotonic()))

    def _emit(self, text: str) -> None:
        if text and not self.quiet:
            self._last = text[-1]
            write_answer(text)

    def _notice(self, message: Warning | str, *_details: Any) -> None:
        """A warning, written above the rows."""
        with self._lock:
            self.region.erase()
            warn(str(message))
            self._redraw()

    def _tick(self) -> None:
        """Redraws after the window changed, and now and then so that the clock runs while a step takes long."""
        while not self._done.wait(TICK):
            with self._lock:
                if size(sys.stderr) != self._size or time.monotonic() - self._drawn > CLOCK:
                    self._redraw()

    def _redraw(self) -> None:
        self._size = width, height = size(sys.stderr)
        content = [Cell(visible(self.held), Look.WRITTEN), *self._content] if self.held else self._content
        shown = window(wrap(content, width), max(1, height - 2)) if content else window([], 1)
        rows = [_styled(row) for row in shown.rows]
        if shown.above:
            rows.insert(0, [(_count(shown.above, "above", width), "dim")])
        if shown.below:
            rows.append([(_count(shown.below, "below", width), "dim")])
        self.region.draw([*rows, [(self._status(width - 1), "dim")]])
        self._drawn = time.monotonic()

    def _status(self, width: int) -> str:
        elapsed = time.monotonic() - self._begun
        if self._draft is not None:
            return caption(self._draft, width, elapsed, self._history)
        doing = f"canvas {self._canvas + 1}" if self._canvas else "reading the prompt"
        return f"{doing} · {elapsed:.1f} s"[: max(0, width)]


def _styled(row: Row) -> Styled:
    return [(text, STYLES[look]) for text, look in row]


def _count(rows: int, where: str, width: int) -> str:
    return f"⋮ {rows} more {where}"[: max(1, width - 1)]


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """A line on the terminal while a model is loaded; not where a download draws its own progress bar."""
    local = name == "demo" or os.path.exists(os.path.expanduser(name))
    if not (local and is_terminal(sys.stderr)):
        yield
        return
    region = Region(sys.stderr)
    region.draw([[(f"loading {one_line(name, size(sys.stderr)[0] - 12)} …", "dim")]])
    try:
        yield
    finally:
        region.erase()
