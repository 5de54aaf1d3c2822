"""What may be written where: control characters, widths, and whether a stream is a terminal."""

from __future__ import annotations

import errno
import os
import sys
import unicodedata
from functools import lru_cache
from typing import TextIO

import click

# A model or a file name must not steer the terminal: controls become the pictures that Unicode has for them.
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if code not in (0x09, 0x0A)}
_PICTURES[0x7F] = "\u2421"
_PICTURES.update({code: "\ufffd" for code in range(0x80, 0xA0)})
# Direction overrides would show words in another order than they were written.
_PICTURES.update({code: "\ufffd" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))})

# The signs that the commands write, for terminals that have none but ASCII.
_ASCII = str.maketrans("·░▒▯⋮…▁▂▃▄▅▆▇█", ".:#?|~._-=+*%#")


class ReaderGone(Exception):
    """Whoever read our stdout has closed it (`| head`): there is nothing left to do, and nothing is wrong."""


def visible(text: str) -> str:
    """`text` with every control character except newline and tab shown as a sign."""
    return text.replace("\r\n", "\n").translate(_PICTURES)


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands cursor movements."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") != "dumb"
    except ValueError:  # closed
        return False


def size(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of the terminal behind `stream` as they are now; 80 by 24 where nobody knows."""
    try:
        columns, rows = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        columns, rows = 0, 0
    return columns or 80, rows or 24


def speaks_unicode(stream: TextIO) -> bool:
    """Whether shading and box characters can be written to `stream`."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def in_ascii(text: str) -> str:
    """`text` with the commands' own signs in ASCII."""
    return text.translate(_ASCII)


@lru_cache(maxsize=4096)
def columns_of(character: str) -> int:
    """Columns that one character takes: 0 for combining marks, 2 for wide ones, else 1."""
    if character.isascii():
        return 1
    from rich.cells import get_character_cell_size

    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return get_character_cell_size(character)


def write_answer(text: str, *, escape: bool | None = None) -> None:
    """Writes a part of the answer to stdout and flushes it; for a terminal its control characters are shown as signs.

    Raises:
        ReaderGone: the other end of the pipe is closed.
    """
    stream = sys.stdout
    try:
        stream.write(visible(text) if (stream.isatty() if escape is None else escape) else text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # Windows says EINVAL for a closed pipe
            raise
        raise ReaderGone from None


def say(text: str, *, dim: bool = False) -> None:
    """Writes a line that is not the answer: to stderr, faint on a terminal when `dim`."""
    if not speaks_unicode(sys.stderr):
        text = in_ascii(text)
    click.secho(text, err=True, dim=True if dim and is_terminal(sys.stderr) else None)
