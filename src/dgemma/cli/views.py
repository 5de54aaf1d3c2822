"""How a run is shown when no live canvas is drawn, and which of the ways is right for where the output goes."""

from __future__ import annotations

import sys
from typing import Protocol

from ..events import Commit, Draft, Early
from .canvas import Cell, Pieces, caption, cells, wrap
from .terminal import is_terminal, say, write_answer

LOG_COLUMNS = 110


class View(Protocol):
    """Shows one run; a context manager, so that the screen is tidy however the run ends."""

    def __enter__(self) -> View: ...

    def __exit__(self, *exc: object) -> None: ...

    def draft(self, draft: Draft) -> None:
        """A step was done."""
        ...

    def early(self, early: Early) -> None:
        """The canvas's first words are certain."""
        ...

    def commit(self, commit: Commit) -> None:
        """A canvas was finished."""
        ...

    def text(self, text: str) -> None:
        """Text of the answer that no commit has brought."""
        ...


class PlainView:
    """The answer as it is committed, and nothing else; not even that when `quiet`."""

    def __init__(self, *, quiet: bool = False):
        self.quiet = quiet
        self._last = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._last not in ("", "\n"):
            write_answer("\n")

    def draft(self, draft: Draft) -> None:
        """Shows nothing."""

    def early(self, early: Early) -> None:
        """Writes the words."""
        self.text(early.text)

    def commit(self, commit: Commit) -> None:
        """Writes the text that the canvas adds."""
        self.text(commit.text)

    def text(self, text: str) -> None:
        """Writes `text` and flushes it."""
        if text and not self.quiet:
            self._last = text[-1]  # before writing: a Ctrl-C that comes in between still gets its line end
            write_answer(text)


class LogView(PlainView):
    """Besides the answer one line a step on stderr: the canvas for those who have no terminal at hand."""

    def __init__(self, pieces: Pieces, *, quiet: bool = False):
        super().__init__(quiet=quiet)
        self.pieces = pieces

    def draft(self, draft: Draft) -> None:
        """Writes the figures and as much of the canvas as a line holds."""
        flat = [Cell(cell.text.replace("\n", " ").replace("\t", " "), cell.look) for cell in cells(draft, self.pieces)]
        row = wrap(flat, LOG_COLUMNS)[0]
        say(f"{caption(draft, LOG_COLUMNS)} | {''.join(text for text, _ in row)}")


def choose(watch: bool | None, pieces: Pieces, *, quiet: bool, diffusion: bool) -> View:
    """The view for these streams. `watch` None: a live canvas when a person is looking; `quiet`: no text on stdout."""
    terminal = is_terminal(sys.stderr)
    if watch is None:
        watch = diffusion and terminal and is_terminal(sys.stdout) and not quiet
    if not watch:
        return PlainView(quiet=quiet)
    if not terminal:
        return LogView(pieces, quiet=quiet)
    from .live import LiveView

    return LiveView(pieces, quiet=quiet)
