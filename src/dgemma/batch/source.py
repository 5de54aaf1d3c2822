"""Reading requests: lines of files and streams, rows of tables, numbered from 1."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import ConfigError
from . import tables
from .codecs import broken, codec_of, need_codec, open_lines
from .settings import STREAM

MAX_LINE = 16 << 20  # bytes: a longer one is refused, so that no file can fill the memory
BOM = b"\xef\xbb\xbf"
PEEK_LINES, PEEK_BYTES = 1000, 8 << 20


class Record(NamedTuple):
    """One request as it was read.

    Fields:
        line: its number in the input, from 1; blank lines have numbers too, but are no records.
        data: the line's bytes; a table's row; None for a line longer than `MAX_LINE`.
    """

    line: int
    data: bytes | dict[str, Any] | None


class Source:
    """Where requests come from.

    Fields:
        name: for messages; path: None for stdin.
        once: whether it can be read only once (stdin, a pipe).
        table: whether it is Parquet.

    Raises:
        ConfigError: there is no such file, it cannot be read, or a library for it is missing.
    """

    def __init__(self, source: str | Path):
        self.path = None if str(source) == STREAM else Path(source)
        self.name = "stdin" if self.path is None else str(self.path)
        self.once = self.path is None
        self.codec = "" if self.path is None else codec_of(self.path)
        self.table = self.path is not None and tables.is_table(self.path)
        self._hash = hashlib.blake2b(digest_size=16)
        self._head: list[Record] = []
        self._stream: Iterator[Record] | None = None
        if self.path is not None:
            self.once = not self._check(self.path)
        need_codec(self.codec, self.name)
        if self.table:
            tables.need(self.name)

    def _check(self, path: Path) -> bool:
        """Whether it is a regular file; raises where it cannot be read."""
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise ConfigError(f"{path}: is a directory; name a file")
            if stat.S_ISREG(mode):
                with path.open("rb"):
                    return True
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None
        if self.table:
            raise ConfigError(f"{path}: Parquet needs a regular file")
        return False

    def identity(self) -> dict[str, Any]:
        """What tells this input from another: size, time, and a hash of all of it."""
        assert self.path is not None
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {**self.stamp(), "digest": digest}

    @property
    def digest(self) -> str:
        """Of a stream: a hash of what `records` has given so far."""
        return self._hash.hexdigest()

    def stamp(self) -> dict[str, Any]:
        """The cheap part of `identity`."""
        assert self.path is not None
        status = self.path.stat()
        return {"path": os.path.abspath(self.path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}

    def peek(self) -> Iterator[Record]:
        """The first records; reading them here takes them from nobody."""
        size = 0
        for record in itertools.islice(self._from_stream() if self.once else self.records(), PEEK_LINES):
            if self.once:
                self._head.append(record)
            size += len(record.data) if isinstance(record.data, bytes) else 0
            yield record
            if size > PEEK_BYTES:
                return

    def columns(self) -> list[str] | None:
        """The names of a table's columns; None for lines."""
        return tables.columns(self.path) if self.table and self.path is not None else None

    def records(self, columns: list[str] | None = None, shard: tuple[int, int] | None = None) -> Iterator[Record]:
        """All records, or each n-th line of them.

        Args:
            columns: of a table; None for all.
            shard: (i, n), see `BatchSettings`.

        Raises:
            ConfigError: compressed data or the table are damaged.
        """
        number, count = shard or (1, 1)
        for record in self._all(columns):
            if self.once:
                self._hash.update(record.data.strip() + b"\n" if isinstance(record.data, bytes) else b"")
            if record.line % count == number % count:
                yield record

    def _all(self, columns: list[str] | None) -> Iterator[Record]:
        if self.once:
            yield from self._head
            self._head = []
            yield from self._from_stream()
        elif self.table:
            assert self.path is not None
            for line, row in enumerate(tables.rows(self.path, columns), 1):
                yield Record(line, row)
        else:
            assert self.path is not None
            with self.path.open("rb") as file:
                yield from self._lines(file)

    def _from_stream(self) -> Iterator[Record]:
        if self._stream is None:
            self._stream = self._lines(_stdin() if self.path is None else self.path.open("rb"))
        return self._stream

    def _lines(self, file: BinaryIO) -> Iterator[Record]:
        reader = open_lines(file, self.codec, self.name)
        try:
            for number in itertools.count(1):
                data = reader.readline(MAX_LINE + 1)
                if not data:
                    return
                if len(data) > MAX_LINE and not data.endswith(b"\n"):
                    while data and not data.endswith(b"\n"):
                        data = reader.readline(MAX_LINE)
                    yield Record(number, None)
                    continue
                if number == 1:
                    data = data.removeprefix(BOM)
                if data.strip():
                    yield Record(number, data)
        except Exception as error:
            if not broken(error):
                raise
            raise ConfigError(f"{self.name}: its compressed data are damaged or end too early ({error})") from None


def _stdin() -> BinaryIO:
    """stdin by itself: a thread that waits in Python's own object for it would hold up the interpreter's end."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError, AttributeError):
        if sys.stdin is None:
            raise ConfigError("stdin: there is none to read from") from None
        return sys.stdin.buffer
