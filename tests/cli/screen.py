"""A terminal for tests: the command runs on a pseudo-terminal, and pyte keeps the screen that a person would see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte

FAKE = str(Path(__file__).with_name("fake_model.py"))
SOURCE = str(Path(__file__).parents[2] / "src")
PATIENCE = 30.0


class Terminal:
    """A command in a terminal of a given size; `raw` is every byte that it wrote.

    Args:
        piped: name of a stream ("stdout" or "stderr") that goes to a file and not to the terminal; its content is
            in `read_piped`.
        variables: added to the environment; None takes one out.
    """

    def __init__(
        self, *arguments: str, columns: int = 80, rows: int = 24, piped: str = "", **variables: str | None
    ) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.frames: list[str] = []
        self.master, slave = pty.openpty()
        self._size(columns, rows)
        self._file = open(os.memfd_create("piped"), "w+b") if piped else None  # noqa: SIM115
        unwanted = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM", "DGEMMA_DEBUG", "FAKE_TEXT")
        env = {name: value for name, value in os.environ.items() if name not in unwanted}
        env.update(PYTHONPATH=SOURCE, TERM="xterm-256color", PYTHONIOENCODING="utf-8")
        for name, value in variables.items():
            env.pop(name, None) if value is None else env.update({name: value})
        streams: dict[str, Any] = {"stdin": slave, "stdout": slave, "stderr": slave}
        if piped:
            streams[piped] = self._file
        self.process = subprocess.Popen(
            [sys.executable, FAKE, *arguments],
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **streams,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        if self._file:
            self._file.close()

    @property
    def text(self) -> str:
        """What is on the screen now, without blank ends."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def scrolled(self) -> str:
        """What is on the screen and what has left it at the top."""
        gone = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join([*(line.rstrip() for line in gone), self.text])

    def wait(self, until: Callable[[Terminal], object] | str, patience: float = PATIENCE) -> Terminal:
        """Reads until the condition holds (or the text is on the screen)."""
        wanted = until if callable(until) else (lambda terminal: until in terminal.text)
        end = time.monotonic() + patience
        while not wanted(self):
            assert time.monotonic() < end, f"not seen: {until!r}; the screen shows:\n{self.text}"
            if not self._read(0.1) and self.process.poll() is not None:
                assert wanted(self), f"ended with {self.process.returncode} before {until!r}:\n{self.text}"
        return self

    def finish(self, patience: float = PATIENCE) -> int:
        """Reads until the command has ended; returns its exit code."""
        end = time.monotonic() + patience
        while self._read(0.1) or self.process.poll() is None:
            assert time.monotonic() < end, f"still running:\n{self.text}"
        return self.process.returncode

    def send(self, text: str) -> None:
        """Types `text`."""
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at the keyboard."""
        self.send("\x03")

    def resize(self, columns: int, rows: int) -> None:
        """Drags the window to another size (the command gets SIGWINCH)."""
        self._size(columns, rows)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGWINCH)
        self.screen.resize(rows, columns)

    def read_piped(self) -> str:
        """What went to the stream that was not the terminal."""
        assert self._file is not None
        self._file.seek(0)
        return self._file.read().decode()

    def _size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += data
        for part in data.split(b"\x1b[?2026l"):
            self._stream.feed(part)
            self.frames.append(self.text)
        return bool(data)
