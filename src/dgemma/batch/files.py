"""One process at a time, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_AWAY = 1 << 30  # on Windows what is locked cannot be read: not the bytes that say who has it


class Lock:
    """A file that one process holds; the system lets go of it when the process dies, however it dies.

    Raises:
        ConfigError: another process has it; the message says which.
    """

    def __init__(self, path: Path, what: Path):
        self.path = path
        while True:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            if not _try_lock(self._handle):
                owner = os.pread(self._handle, 200, 0) if hasattr(os, "pread") else os.read(self._handle, 200)
                os.close(self._handle)
                who = owner.decode("utf-8", "replace").strip() or "unknown"
                raise ConfigError(f"{what}: process {who} is writing it; wait for its end, or name another file")
            # Whoever had it before may have taken the file away between opening and locking it.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._handle), os.stat(path)):
                    break
            os.close(self._handle)
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"{os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Lets others have it."""
        if sys.platform == "win32":
            os.close(self._handle)
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        else:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            os.close(self._handle)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _AWAY, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a new file that takes the place of `path` when it is whole and on the disk, and goes on an error.

    The caller holds the lock: the name is always the same, so that a process that was killed leaves one at most.
    """
    temporary = path.with_name(f".{path.name[:200]}.new")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes a small file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_folder(path: Path) -> None:
    """Makes names of files last beyond a power failure, where the system has that."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
