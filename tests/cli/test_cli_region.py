"""Redrawing in place: whatever was drawn before, the screen shows the new rows and nothing else."""

from __future__ import annotations

import io
import random

import pyte
import pytest

from dgemma.cli import live
from dgemma.cli.live import Region


class Screen:
    """A `Region` on a screen of a given size, without a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int, rows: int):
        monkeypatch.setattr(live, "size", lambda _stream: (columns, rows))
        self.written = io.StringIO()
        self.screen = pyte.HistoryScreen(columns, rows, history=500)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = pyte.Stream(self.screen)
        self.region = Region(self.written)

    def show(self) -> list[str]:
        """The rows of the screen after what was written so far."""
        self.stream.feed(self.written.getvalue())
        self.written.truncate(0)
        self.written.seek(0)
        return [line.rstrip() for line in self.screen.display]


@pytest.mark.parametrize("columns", [1, 2, 7, 20, 80])
@pytest.mark.parametrize("rows", [4, 12])
def test_any_rows_after_any_others(columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(columns * 100 + rows)
    terminal = Screen(monkeypatch, columns, rows)
    terminal.stream.feed("$\n")
    for _ in range(60):
        drawn = ["x" * rng.choice((0, 1, columns // 2, columns - 1, columns)) for _ in range(rng.randint(1, rows - 1))]
        drawn[-1] = drawn[-1][: columns - 1]  # the status line never fills its row
        terminal.region.draw([[(row, rng.choice(("", "bold", "dim cyan")))] for row in drawn])
        assert terminal.show() == ["$", *drawn, *[""] * (rows - 1 - len(drawn))]
        assert terminal.screen.cursor.hidden


def test_nothing_is_erased_at_the_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """xterm would take the character that has just been written there (pyte would not)."""
    terminal = Screen(monkeypatch, 20, 8)
    terminal.region.draw([[("x" * 20, "")], [("y" * 19, "")]])
    assert terminal.written.getvalue().count("\x1b[K") == 1


def test_erasing_leaves_what_was_above(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Screen(monkeypatch, 20, 8)
    terminal.stream.feed("$ command\n")
    terminal.region.draw([[("one", "")], [("x" * 20, "bold")], [("three", "dim")]])
    terminal.region.erase()
    terminal.written.write("answer\n")
    assert terminal.show() == ["$ command", "answer", "", "", "", "", "", ""]
    assert not terminal.screen.cursor.hidden


def test_rows_broken_by_a_narrower_window_are_erased_too(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Screen(monkeypatch, 40, 12)
    terminal.stream.feed("$ command\n")
    terminal.region.draw([[("a" * 40, "")], [("b" * 25, "")]])
    terminal.show()
    # What terminals that break lines anew make of the two rows at 10 columns: four rows and three.
    monkeypatch.setattr(live, "size", lambda _stream: (10, 12))
    narrow = pyte.Screen(10, 12)
    stream = pyte.Stream(narrow)
    stream.feed("$ command\r\n" + "a" * 40 + "\r\n" + "b" * 25)
    terminal.region.draw([[("new", "")]])
    stream.feed(terminal.written.getvalue())
    assert [line.rstrip() for line in narrow.display][:3] == ["$ command", "new", ""]


def test_a_terminal_that_has_gone_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Screen(monkeypatch, 40, 12)
    terminal.written.close()
    terminal.region.draw([[("row", "")]])
    terminal.region.erase()
