"""Writing a directory's files so that a reader sees all of the new ones or all of the old ones."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, TypeVar

from ..errors import CheckpointError
from .files import BITS, INDEX, SINGLE, Entry, read_blocks

Block = bytes | memoryview


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Sized = TypeVar("Sized", bound=_Sized)


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A tensor to be written: `blocks` gives its bytes when its turn comes, so only one has to be in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Block]]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return size_of(self.dtype, self.shape)

    @classmethod
    def copy_of(cls, entry: Entry) -> Outgoing:
        """The same tensor as in another file, unchanged."""
        return cls(name=entry.name, dtype=entry.dtype, shape=entry.shape, blocks=lambda: read_blocks(entry))


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * BITS[dtype] // 8


def make_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where in it each tensor starts, in the file's order.

    Args:
        tensors: type and shape by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this entry
    starts: dict[str, int] = {}
    position = 0
    # Wide types first, as the library does it: every tensor then starts at a multiple of its type's size.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-BITS[item[1][0]], item[0])):
        end = position + size_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        starts[name] = position
        position = end
    raw = frame(header)
    return raw, {name: start + len(raw) for name, start in starts.items()}


def frame(header: Mapping[str, Any], size: int | None = None) -> bytes:
    """A header as a file's first bytes, filled up with blanks to a multiple of 8, or to `size` bytes."""
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8 if size is None else size - 8 - len(raw))
    assert size in (None, len(raw) + 8)
    return len(raw).to_bytes(8, "little") + raw


class Staging:
    """A directory's new files under temporary names, swapped in together.

    Used as a context: leaving it without `commit`, by an error or otherwise, removes what was staged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._mark = uuid.uuid4().hex[:8]
        self._staged: dict[str, Path] = {}
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: is a file; a checkpoint is written to a directory")
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        with explained(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._made = missing
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in self._staged.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        for path in self._made:
            with contextlib.suppress(OSError):  # not empty: the commit went through, or others write here too
                path.rmdir()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Opens a staged file for writing; it is on the disk, not only in the cache, when this ends."""
        path = self.directory / f".{name}.{self._mark}.tmp"
        self._staged[name] = path
        with explained(self.directory / name), path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, content: Any) -> None:
        """Stages a JSON file."""
        with self.open(name) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def write_tensors(self, name: str, tensors: Sequence[Outgoing]) -> None:
        """Stages a safetensors file, one tensor in memory at a time."""
        by_name = {tensor.name: tensor for tensor in tensors}
        raw, starts = make_header({name: (tensor.dtype, tensor.shape) for name, tensor in by_name.items()})
        with self.open(name) as file:
            file.write(raw)
            for tensor in (by_name[each] for each in starts):
                written = sum(file.write(block) for block in tensor.blocks())
                assert written == tensor.nbytes, tensor.name

    def commit(self, *, remove: Iterable[Path] = ()) -> None:
        """Puts the staged files in place of their elders and removes others; undoes everything if one step fails."""
        old = {path for path in remove if path.exists()}
        old |= {path for name in self._staged if (path := self.directory / name).exists()}
        undo: list[tuple[Path, Path]] = []
        with explained(self.directory):
            try:
                for path in sorted(old):
                    aside = path.with_name(f".{path.name}.{self._mark}.old")
                    os.replace(path, aside)
                    undo.append((aside, path))
                for name, path in self._staged.items():
                    os.replace(path, self.directory / name)
                    undo.append((self.directory / name, path))
            except BaseException:
                for now, before in reversed(undo):
                    os.replace(now, before)
                raise
        for path in old:
            with contextlib.suppress(OSError):
                path.with_name(f".{path.name}.{self._mark}.old").unlink()
        self._staged = {}


def stage_weights(staging: Staging, tensors: Sequence[Outgoing], max_shard_bytes: float) -> None:
    """Stages one `model.safetensors`, or shards of at most that size (a larger tensor has its own) and their index."""
    shards = split(tensors, max_shard_bytes)
    where: dict[str, str] = {}
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        staging.write_tensors(name, shard)
        where |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        staging.write_json(INDEX, index_of(where, sum(tensor.nbytes for tensor in tensors)))


def split(items: Sequence[Sized], limit: float) -> list[list[Sized]]:
    """Neighbours together, as many as fit `limit` bytes; a larger one is alone."""
    shards: list[list[Sized]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The file names of so many shards."""
    return [SINGLE] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def index_of(where: dict[str, str], total: int) -> dict[str, Any]:
    """The content of the index: the file of each tensor, and all their bytes."""
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns the system's errors into one that names the path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
