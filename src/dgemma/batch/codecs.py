"""Compressed files: read as a stream, written as a row of whole members that can be told apart."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError

CHUNK = 1 << 20
SMALL = 1 << 14  # compressed bytes that are read at once, of which nobody knows how many they become
GZIP = 31  # zlib's number for gzip's own header and checksum
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile)


def codec_of(path: Path | str) -> str:
    """ "gz", "zst" or "" by the file's name."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    return suffix if suffix in ("gz", "zst") else ""


def need_codec(codec: str, name: str) -> None:
    """Raises ConfigError where a library is missing for it; `name` is the file."""
    if codec == "zst":
        zstandard(name)


def zstandard(name: str) -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import zstandard as library
    except ImportError:
        raise ConfigError(f"{name}: zstd needs the package zstandard (pip install 'dgemma[batch]')") from None
    return library


def open_lines(file: BinaryIO, codec: str, name: str) -> io.BufferedReader | gzip.GzipFile | BinaryIO:
    """What a file holds, uncompressed, for `readline`; several members one after another are one stream."""
    if codec == "gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if codec == "zst":
        return io.BufferedReader(_Frames(file, name), CHUNK)
    return file


class _Frames(io.RawIOBase):
    """What zstd frames hold, one after another; the library's own reader takes a frame that is cut off for whole."""

    def __init__(self, file: BinaryIO, name: str):
        self._file, self._library = file, zstandard(name)
        self._decoder: Any = None
        self._left = b""  # compressed, of the next frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes.

        Raises:
            EOFError: the last frame is not whole.
        """
        while not self._ready:
            data = self._left or self._file.read(SMALL)
            self._left = b""
            if not data:
                if self._decoder is not None:
                    raise EOFError("the last frame is not whole")
                return 0
            if self._decoder is None:
                self._decoder = self._library.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._decoder.decompress(data))
            if self._decoder.eof:
                self._left, self._decoder = self._decoder.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def broken(error: Exception) -> bool:
    """Whether an error says that compressed data are damaged or end too early."""
    return isinstance(error, BROKEN) or type(error).__name__ == "ZstdError"


def compressor(codec: str) -> Callable[[bytes], bytes]:
    """Makes one member of some bytes, with a checksum."""
    if codec == "gz":
        return lambda data: gzip.compress(data, compresslevel=6, mtime=0)
    if codec == "zst":
        return zstandard("").ZstdCompressor(level=3, write_checksum=True).compress
    return lambda data: data


def segments(file: BinaryIO, codec: str) -> Iterator[tuple[int, bytes]]:
    """Whole pieces of a file from its beginning: (end in the file, content). A piece is a line, or a member's content.

    It ends before the first piece that is torn or damaged.
    """
    if not codec:
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield end, line
        return
    start = 0
    while True:
        file.seek(start)
        decoder: Any = zlib.decompressobj(GZIP) if codec == "gz" else zstandard("").ZstdDecompressor().decompressobj()
        parts, read = [], 0
        while not decoder.eof:
            data = file.read(CHUNK)
            if not data:
                return
            read += len(data)
            try:
                parts.append(decoder.decompress(data))
            except Exception as error:
                if broken(error):
                    return
                raise
        start += read - len(decoder.unused_data)
        yield start, b"".join(parts)
