"""Writing behind: a thread of its own takes lines to their files, and sees to it now and then that they last."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Sequence

from ..errors import ConfigError
from .append import Sink

WAITING = 4096  # lines that wait for the disk at most; then whoever makes more waits
GATHER = 512  # lines that are written together at most


class Writer:
    """Hands lines to sinks, in order.

    Raises:
        OSError: (from every method, once it has happened) a sink failed; nothing is written any more.
    """

    def __init__(self, sinks: Sequence[Sink], sync_seconds: float):
        self._sinks, self._seconds = sinks, sync_seconds
        self._queue: queue.Queue[tuple[Sink, bytes] | threading.Event | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dgemma-writer", daemon=True)
        self._thread.start()

    def put(self, sink: Sink, lines: bytes) -> None:
        """Takes whole lines for one of the sinks."""
        self._put((sink, lines))

    def flush(self) -> None:
        """Everything so far is on the disk when this returns."""
        done = threading.Event()
        self._put(done)
        while not done.wait(0.5):
            self.check()

    def check(self) -> None:
        """Raises what has gone wrong."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Everything is on the disk when this returns."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                self._thread.join()
        self.check()

    def _put(self, item: tuple[Sink, bytes] | threading.Event) -> None:
        while True:
            self.check()
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=0.5)

    def _run(self) -> None:
        try:
            self._write()
            for sink in self._sinks:
                sink.close()
        except BaseException as error:
            self._error = error
            for sink in self._sinks:
                with contextlib.suppress(OSError):
                    sink.close()

    def _write(self) -> None:
        due: float | None = None  # when what was written is to be on the disk
        while True:
            batch: list[tuple[Sink, bytes]] = []
            last: threading.Event | tuple[Sink, bytes] | None = (self._sinks[0], b"")
            with contextlib.suppress(queue.Empty):
                last = self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
                while isinstance(last, tuple):
                    batch.append(last)
                    if len(batch) == GATHER:
                        break
                    last = self._queue.get_nowait()
            for sink in self._sinks:
                lines = b"".join(data for to, data in batch if to is sink)
                if lines:
                    sink.write(lines)
            if last is None:
                return
            if batch and due is None:
                due = time.monotonic() + self._seconds
            if isinstance(last, threading.Event) or (due is not None and time.monotonic() >= due):
                for sink in self._sinks:
                    sink.sync()
                due = None
            if isinstance(last, threading.Event):
                last.set()


class Stdout:
    """Lines to whoever reads stdout.

    Raises:
        ConfigError: it was closed from the start.
        BrokenPipeError: nobody reads it any more.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise ConfigError("stdout: there is none to write to")

    def write(self, lines: bytes) -> None:
        """Takes whole lines, and they go out at once."""
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()

    def sync(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """It belongs to the process."""
