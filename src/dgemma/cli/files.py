"""Writing a file whole or not at all, and saying beforehand when it cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from .failures import BadInput


def check_writable(path: Path, name: str) -> None:
    """Refuses a path that cannot be written, before any work is done for it; `name` is its flag or command."""
    folder = path.parent
    if not folder.is_dir():
        raise BadInput(f"{name}: {folder} is not a directory; create it first")
    if path.is_dir():
        raise BadInput(f"{name}: {path} is a directory; name a file")
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{name}: {folder} cannot be written to; choose another directory")


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 beside `path` and then puts it in its place, so that no half of it is ever seen.

    Raises:
        OSError: the disk or the permissions do not allow it; the old file, if there was one, is intact.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
