"""Writing a large checkpoint shard by shard, so that an interrupted run goes on where it was.

All files are written to `NAME.partial` beside the destination `NAME`, which appears by one rename when everything is
there. Each shard appears in the partial directory by a rename too, and is then noted in `NAME.partial.json`, with the
figures measured on it; a later run with the same settings skips it. Index and `config.json` come last: until then
nothing reads the partial directory as a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CapacityError, CheckpointError
from ..memory import in_words
from .files import INDEX
from .writer import Block, explained, index_of, make_header, shard_names, size_of, split

Measured = dict[str, dict[str, float]]  # sums by kind of weight


@dataclass(frozen=True, kw_only=True)
class Item:
    """Tensors that are made together.

    Fields:
        headers: type and shape by name on disk.
        blocks: makes their content: (name, bytes) again and again, in each tensor's own order. It gets a dictionary
            to count figures in.
    """

    headers: dict[str, tuple[str, tuple[int, ...]]]
    blocks: Callable[[Measured], Iterable[tuple[str, Block]]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(size_of(*header) for header in self.headers.values())


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: bytes of tensors written (earlier runs' included) of how many, in which shard of how many."""

    done: int
    total: int
    shard: int
    shards: int


class Resumable:
    """One checkpoint on its way.

    Args:
        destination: where it appears; must not be there yet (an empty directory may).
        items: what it consists of, in the order of the files.
        settings: anything, as JSON, that a later run must share to go on with this one.
        max_shard_bytes: above this a shard is ended.

    Raises:
        CheckpointError: the destination exists, or another run's partial directory is in the way.
    """

    def __init__(self, destination: Path, items: list[Item], settings: dict[str, Any], max_shard_bytes: float):
        self.destination = Path(os.path.abspath(destination))
        self.partial = self.destination.with_name(self.destination.name + ".partial")
        self.notes = self.destination.with_name(self.destination.name + ".partial.json")
        self.shards = split(items, max_shard_bytes)
        self._settings = json.loads(json.dumps(settings | {"max_shard_bytes": max_shard_bytes}))
        if self.destination.exists() and (not self.destination.is_dir() or any(self.destination.iterdir())):
            raise CheckpointError(f"{destination}: exists; name a directory that does not")
        self._done = self._read_notes()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(item.nbytes for shard in self.shards for item in shard)

    def run(self, report: Callable[[Progress], None]) -> Measured:
        """Writes the shards that are not there yet; returns the sums of all.

        Raises:
            CapacityError: the disk has no room for them.
            CheckpointError: something cannot be read or written; what is done stays for the next run.
        """
        with explained(self.partial):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            for left in self.partial.glob("*.tmp") if self.partial.is_dir() else ():
                left.unlink()
        names = shard_names(len(self.shards))
        missing = [number for number, name in enumerate(names) if name not in self._done]
        self._check_room(sum(item.nbytes for number in missing for item in self.shards[number]))
        self._write_notes()
        with explained(self.partial):
            self.partial.mkdir(exist_ok=True)
        total = self.nbytes
        done = total - sum(item.nbytes for number in missing for item in self.shards[number])
        for number in missing:
            report(Progress(done=done, total=total, shard=number + 1, shards=len(names)))
            measured: Measured = {}
            for count in _write_shard(self.partial / names[number], self.shards[number], measured):
                done += count
                report(Progress(done=done, total=total, shard=number + 1, shards=len(names)))
            self._done[names[number]] = measured
            self._write_notes()
        sums: Measured = {}
        for measured in self._done.values():
            for kind, figures in measured.items():
                into = sums.setdefault(kind, dict.fromkeys(figures, 0))
                for figure, value in figures.items():
                    into[figure] += value
        return sums

    def finish(self, files: dict[str, bytes]) -> None:
        """Adds the index and the small files, and gives the directory its name."""
        names = shard_names(len(self.shards))
        if len(names) > 1:
            where = {
                name: file for file, shard in zip(names, self.shards, strict=True) for i in shard for name in i.headers
            }
            files = {INDEX: (json.dumps(index_of(where, self.nbytes), indent=2) + "\n").encode(), **files}
        for name, content in files.items():
            with explained(self.partial / name), (self.partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        with explained(self.destination):
            if self.destination.is_dir():
                self.destination.rmdir()
            os.replace(self.partial, self.destination)
        with contextlib.suppress(OSError):
            self.notes.unlink()

    def _check_room(self, needed: int) -> None:
        with explained(self.partial):
            free = shutil.disk_usage(self.partial.parent).free
        if needed > free:
            raise CapacityError(
                f"{self.destination}: {in_words(needed)} are to be written, the disk has {in_words(free)} free"
            )

    def _read_notes(self) -> dict[str, Measured]:
        """What earlier runs have done; shards that are not there in full are forgotten."""
        if not self.partial.exists():
            return {}
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
            same, done = notes["settings"] == self._settings, dict(notes["done"])
        except (OSError, ValueError, LookupError, TypeError):
            same, done = False, {}
        if not same:
            raise CheckpointError(
                f"{self.partial}: is of a run with other settings or another source; remove it to start anew"
            )
        sizes = {
            name: _file_size(shard) for name, shard in zip(shard_names(len(self.shards)), self.shards, strict=True)
        }
        return {
            name: measured
            for name, measured in done.items()
            if (self.partial / name).is_file() and (self.partial / name).stat().st_size == sizes.get(name)
        }

    def _write_notes(self) -> None:
        aside = self.notes.with_name(self.notes.name + ".tmp")
        with explained(self.notes):
            aside.write_text(json.dumps({"settings": self._settings, "done": self._done}), encoding="utf-8")
            os.replace(aside, self.notes)


def _headers(items: list[Item]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: header for item in items for name, header in item.headers.items()}


def _file_size(items: list[Item]) -> int:
    raw, _ = make_header(_headers(items))
    return len(raw) + sum(item.nbytes for item in items)


def _write_shard(path: Path, items: list[Item], measured: Measured) -> Iterator[int]:
    """Writes a shard under a temporary name, then gives it its own; yields how many bytes were written.

    The tensors of one matrix lie apart in the file, which is ordered by type: each block goes to its own place.
    """
    headers = _headers(items)
    raw, places = make_header(headers)
    ends = {name: start + size_of(*headers[name]) for name, start in places.items()}
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(raw)
            for item in items:
                for name, block in item.blocks(measured):
                    file.seek(places[name])
                    count = file.write(block)
                    places[name] += count
                    yield count
            assert places == ends
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{path}: cannot be written ({error.strerror or error}); the same command goes on with this shard"
            ) from None
        raise
