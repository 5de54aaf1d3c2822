"""A file that grows by whole lines, and its mending after a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from .codecs import codec_of, compressor, segments
from .files import replacing, sync_folder

MEMBER = 1 << 20  # bytes that are compressed together at most


class Sink(Protocol):
    """Where lines go."""

    def write(self, lines: bytes) -> None:
        """Takes whole lines."""

    def sync(self) -> None:
        """Sees to it that they last."""

    def close(self) -> None:
        """The same, for good."""


class Appender:
    """Adds lines to the end of a file, which is made if it is missing; if `late`, only when there are lines for it.

    Lines are compressed some at a time, into members of their own: what was written stays readable whatever happens
    to what comes after it. An uncompressed line is with the system when `write` returns, so that only the machine's
    own end can lose it before `sync`.
    """

    def __init__(self, path: Path, *, late: bool = False):
        self.path = path
        codec = codec_of(path)
        self._compress = compressor(codec) if codec else None
        self._waiting: list[bytes] = []
        self._size = 0
        self._handle: int | None = None
        self._end = 0
        if not late:
            self._open()

    def write(self, lines: bytes) -> None:
        """Takes whole lines.

        Raises:
            OSError: the disk is full, or worse; the file ends with the last line that went in whole.
        """
        if self._compress is None:
            self._append(lines)
            return
        self._waiting.append(lines)
        self._size += len(lines)
        if self._size >= MEMBER:
            self._flush()

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        self._flush()
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """The last `sync`."""
        try:
            self.sync()
        finally:
            if self._handle is not None:
                os.close(self._handle)

    def _open(self) -> int:
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._end = os.fstat(self._handle).st_size
        sync_folder(self.path.parent)
        return self._handle

    def _flush(self) -> None:
        if self._waiting and self._compress is not None:
            data, self._waiting, self._size = b"".join(self._waiting), [], 0
            self._append(self._compress(data))

    def _append(self, data: bytes) -> None:
        handle = self._open() if self._handle is None else self._handle
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, self._end)
            error.filename = str(self.path)
            raise
        self._end += len(data)


def mend(path: Path, accept: Callable[[bytes], bool]) -> int:
    """Leaves only whole, accepted lines in a file that an `Appender` wrote; returns how many it took away.

    A torn end is cut off. Lines that are not accepted elsewhere (a power failure can leave such) are taken out of a
    copy, which then replaces the file.

    Args:
        accept: is given each line once.
    """
    if not path.exists():
        return 0
    codec = codec_of(path)
    refused: set[int] = set()
    number = whole = end = accepted_after = 0
    with path.open("rb") as file:
        for end, content in segments(file, codec):
            for line in content.splitlines(keepends=True):
                if accept(line):
                    accepted_after = len(refused)
                else:
                    refused.add(number)
                number += 1
            if not refused:
                whole = end
        size = path.stat().st_size
    torn = int(end < size)
    if accepted_after or (refused and codec):
        _copy(path, refused, codec)
    elif whole < size:
        with path.open("rb+") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    return len(refused) + torn


def _copy(path: Path, refused: set[int], codec: str) -> None:
    compress, number = compressor(codec), 0
    with path.open("rb") as file, replacing(path) as temporary, temporary.open("wb") as new:
        for _, content in segments(file, codec):
            kept = []
            for line in content.splitlines(keepends=True):
                if number not in refused:
                    kept.append(line)
                number += 1
            if kept:
                new.write(compress(b"".join(kept)))
