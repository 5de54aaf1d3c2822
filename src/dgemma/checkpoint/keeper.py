"""Making a packed copy (`kept.py`) while a network is loaded.

It is written under another name, which is a lock too: what a killed process leaves has no lock, and the next start
removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.packed import LAYOUT, Packed
from ..memory import in_words
from .hub import CACHE, copy_path
from .kept import ALIGNED, CODES, FORMAT, Few, Mapped, PackedCopyUnused, Shapes, mapped, name_of, source_digest
from .writer import frame

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PAGE = 4096


@contextlib.contextmanager
def at_hand(directory: Path, dtype: torch.dtype, shapes: Shapes, *, keep: bool) -> Iterator[Mapped | Keeper | None]:
    """What there is of a model's packed copy: all of it; else, if it is to be kept, what writes it.

    Args:
        dtype: that the network computes in.
        shapes: of all its weights, by name.

    Raises:
        CapacityError: there is a valid one, larger than the machine's memory.
    """
    if not cpu.available():
        if keep:
            _warn(copy_path(directory), "the compiled kernels are missing")
        yield None
        return
    _sweep(_aside(copy_path(directory)))
    found = mapped(directory, dtype, shapes, quiet=keep)
    if found is not None or not keep:
        yield found
        return
    with Keeper(directory, dtype) as keeper:
        # Whoever was waited for may have made it.
        yield (mapped(directory, dtype, shapes, quiet=True) if keeper.waited else None) or keeper


class Keeper:
    """Writes a packed copy, weight by weight, while a network is loaded. Used as a context.

    What goes wrong is said in a warning, and what is written then is removed; loading goes on. Entering waits for
    another process that writes the same copy.

    Fields:
        waited: whether another process was writing it, and may have made it.
    """

    def __init__(self, directory: Path, dtype: torch.dtype):
        self.directory, self.path, self.waited = directory, copy_path(directory), False
        self._dtype = name_of(dtype)
        self._aside = _aside(self.path)
        self._file: BinaryIO | None = None
        self._source, self._vision, self._room = "", 0, 0
        self._header: dict[str, Any] = {}
        self._few: Few = {}
        self._end = 0
        self._odd: list[tuple[str, Tensor]] = []

    def __enter__(self) -> Keeper:
        if fcntl is None:
            self._give_up("this system has no file locks")
            return self
        if not self.path.is_absolute():
            self._give_up(f"nobody's home directory; {CACHE} names a folder")
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self.waited = _claim(self._aside)
            self._source = source_digest(self.directory)
        except OSError as error:
            self._give_up(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def begin(self, names: Iterable[str], nbytes: int, vision: int) -> None:
        """Says what comes.

        Args:
            names: of all weights.
            nbytes: about how many they take.
            vision: see `PackedCopy`.
        """
        if self._file is None:
            return
        self._vision = vision
        room = sum(4 * len(json.dumps(name)) + 512 for name in names)  # more than three tensors and `few` take
        self._room = self._end = _PAGE + -(-room // _PAGE) * _PAGE
        try:
            self._file.truncate(0)
            free = shutil.disk_usage(self.path.parent).free
            if nbytes > free:
                self._give_up(f"it takes {in_words(nbytes)}, the disk has {in_words(free)} free")
        except OSError as error:
            self._give_up(error)

    def add(self, name: str, weight: Tensor | cpu.Weight) -> None:
        """Writes one weight, as the network holds it."""
        if self._file is None:
            return
        if isinstance(weight, Packed):
            self._few[name] = (weight.bits, weight.group)
            parts = {f"{name}.{part}": tensor for part, tensor in weight.tensors.items()}
        elif isinstance(weight, Tensor):
            parts = {name: weight}
        else:
            self._give_up(f"the compiled kernels have no layout for {name}")
            return
        for part, tensor in parts.items():
            if tensor.nbytes % ALIGNED:
                self._odd.append((part, tensor))
            else:
                self._write(part, tensor)

    def finish(self) -> None:
        """Gives the copy its name, now that every weight is there."""
        for name, tensor in self._odd:
            self._write(name, tensor)
        if self._file is None:
            return
        about = {
            "format": FORMAT,
            "layout": str(LAYOUT),
            "source": self._source,
            "dtype": self._dtype,
            "vision": str(self._vision),
            "few": json.dumps(self._few),
        }
        try:
            if source_digest(self.directory) != self._source:
                self._give_up("the model's files changed while they were read")
                return
            self._file.seek(0)
            self._file.write(frame({"__metadata__": about, **self._header}, self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._aside, self.path)
            self._file.close()
            self._file = None
        except OSError as error:
            self._give_up(error)

    def _write(self, name: str, tensor: Tensor) -> None:
        if self._file is None:
            return
        start, self._end = self._end, self._end + tensor.nbytes
        self._header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start - self._room, self._end - self._room],
        }
        array: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            self._file.seek(start)
            self._file.write(memoryview(array))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, why: str | OSError) -> None:
        reason = why if isinstance(why, str) else why.strerror or str(why)
        _warn(self.path, reason)
        self._drop()

    def _drop(self) -> None:
        """Removes what is not finished."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            self._aside.unlink()
        with contextlib.suppress(OSError):  # of a full disk: what is still to be written
            file.close()


def _sweep(aside: Path) -> None:
    """Removes what a process that was killed has left of a copy."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), aside.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), aside.stat()):
            aside.unlink()


def _warn(path: Path, reason: str) -> None:
    warnings.warn(f"{path}: no packed copy is kept ({reason})", PackedCopyUnused, stacklevel=3)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _claim(path: Path) -> tuple[BinaryIO, bool]:
    """A file that this process alone has, made if need be; and whether another one had it."""
    waited = False
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, waited
        except BaseException:
            file.close()
            raise
        file.close()  # its name is gone: whoever had it is done
