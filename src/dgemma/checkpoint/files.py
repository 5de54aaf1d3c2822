"""The weight files of a model directory: found, their headers checked, their bytes read tensor by tensor.

Format: https://github.com/huggingface/safetensors#format. A file is an 8-byte little-endian length, that many bytes
of JSON, then the tensors' bytes without gaps. Reading into memory that torch owns, instead of mapping the file, keeps
the peak at one tensor above the model and stays safe when the file changes underneath a running server.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Bits a value of every type that the format knows.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADER_LIMIT = 100_000_000  # as in the safetensors library: a corrupt length must not make us allocate it
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_BLOCK = 16 * 2**20
_SAMPLES, _SAMPLE = 32, 1 << 16  # pieces of a file, and their bytes, that tell it from another


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor in a safetensors file: `start` and `stop` are byte positions in `path`."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def find_weights(directory: Path) -> dict[str, Entry]:
    """Every tensor that a model directory holds, by its name on disk.

    Looks for `model.safetensors`, else `model.safetensors.index.json` and its shards, else a lone `*.safetensors`.

    Raises:
        CheckpointError: no weights, only pickles, a file that is damaged, or files that contradict each other.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    single, index = directory / SINGLE, directory / INDEX
    if index.is_file():
        shards = _read_index(index)
        if single.is_file() and SINGLE not in shards.values():
            raise CheckpointError(f"{directory}: both {SINGLE} and {INDEX}; remove the one that is out of date")
        return _read_shards(index, shards)
    if single.is_file():
        return read_header(single)
    others = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    if len(others) == 1:
        return read_header(others[0])
    if others:
        raise CheckpointError(f"{directory}: {len(others)} .safetensors files but no {INDEX} that says what is where")
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: a pickle can run code when it is opened, so dgemma does not read it; "
            "convert it to safetensors"
        )
    raise CheckpointError(f"{directory}: no weights; needs {SINGLE}, or {INDEX} and its shards")


def has_weights(directory: Path) -> bool:
    """Whether `find_weights` has a safetensors file to look at."""
    return (directory / INDEX).is_file() or any(not p.name.startswith(".") for p in directory.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, checked against the file's size.

    Raises:
        CheckpointError: the file can't be opened, is truncated, or its header makes no sense.
    """
    try:
        with path.open("rb") as file:
            return check_header(path, file)[0]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_header(path: Path, file: BinaryIO) -> tuple[dict[str, Entry], Any]:
    """The tensors of a safetensors file that is open at its start, and its metadata, which nobody has looked at.

    Raises:
        CheckpointError: as `read_header`; OSError: it can't be read.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise CheckpointError(f"{path}: truncated or no safetensors file ({size} bytes; fetch it again)")
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is corrupt ({_line(error)}; fetch the file again)") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is corrupt (no JSON object; fetch the file again)")
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, 8 + length) for name, fields in header.items()}
    position = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.stop > size:
            raise CheckpointError(f"{path}: truncated: {entry.name} ends at byte {entry.stop}, the file at {size}")
        if entry.start != position:
            raise CheckpointError(f"{path}: the header is corrupt ({entry.name} does not start where the last ended)")
        position = entry.stop
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes at the end belong to no tensor; fetch it again")
    return entries, metadata


def read_into(entry: Entry, buffer: memoryview) -> None:
    """Fills `buffer` (`entry.nbytes` bytes) with the tensor's bytes.

    Raises:
        CheckpointError: the file can't be read, or ends early because it changed since its header was read.
    """
    try:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])  # one read gives 2 GB at most
                if not count:
                    raise CheckpointError(f"{entry.path}: truncated: the file ends inside {entry.name}")
                done += count
    except OSError as error:
        raise CheckpointError(f"{entry.path}: cannot read {entry.name} ({error.strerror or error})") from None


def expect(entries: Iterable[Entry]) -> None:
    """Tells the system which tensors are read next, so that it can fetch them from the disk meanwhile."""
    if not hasattr(os, "posix_fadvise"):
        return
    by_path: dict[Path, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.path, []).append(entry)
    for path, own in by_path.items():
        first = min(entry.start for entry in own)
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), first, max(e.stop for e in own) - first, os.POSIX_FADV_WILLNEED)


def read_blocks(entry: Entry, block: int = _BLOCK) -> Iterator[memoryview]:
    """The tensor's bytes, block by block; a block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(min(block, entry.nbytes)))
    position = entry.start
    while position < entry.stop:
        part = buffer[: min(block, entry.stop - position)]
        piece = Entry(
            path=entry.path,
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            start=position,
            stop=position + len(part),
        )
        read_into(piece, part)
        yield part
        position += len(part)


def same_content(one: Entry, other: Entry) -> bool:
    """Whether two tensors on disk have the same type, shape and bytes; reads both in small blocks."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(read_blocks(one), read_blocks(other), strict=True))


def read_samples(path: Path) -> Iterator[bytes]:
    """A file's size, and pieces of it from the first byte to the last: what tells it from another of its kind.

    Raises:
        OSError: it can't be read.
    """
    size = path.stat().st_size
    yield f"{path.name} {size} ".encode()
    with path.open("rb") as file:
        for start in sorted({number * max(0, size - _SAMPLE) // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            file.seek(start)
            yield file.read(_SAMPLE)


def _read_index(index: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name to file name."""
    try:
        data = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: not readable as JSON ({_line(error)})") from None
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: weight_map: missing; it says which file holds which tensor")
    for name, file in shards.items():
        # A name with a folder in it could point anywhere on the disk.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name}: {file!r} is not the name of a .safetensors file beside it")
    return shards


def _read_shards(index: Path, shards: dict[str, str]) -> dict[str, Entry]:
    """All tensors of an index's shards; index and headers must agree in both directions."""
    entries: dict[str, Entry] = {}
    for file in sorted(set(shards.values())):
        path = index.parent / file
        if not path.is_file():
            missing = next(name for name, shard in shards.items() if shard == file)
            raise CheckpointError(f"{path}: no such shard; {INDEX} says it holds {missing}")
        for name, entry in read_header(path).items():
            if name in entries:
                raise CheckpointError(f"{path}: {name} is in {entries[name].path.name} too; one of them is wrong")
            if name not in shards:
                raise CheckpointError(f"{path}: holds {name}, which {INDEX} does not name")
            entries[name] = entry
    for name, file in shards.items():
        if name not in entries or entries[name].path.name != file:
            raise CheckpointError(f"{index.parent / file}: lacks {name}, which {INDEX} says it holds")
    return entries


def _entry(path: Path, name: str, fields: Any, base: int) -> Entry:
    """One tensor's header fields, checked."""

    def corrupt(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: the header is corrupt ({name}: {what}; fetch the file again)")

    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("needs dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise corrupt(f"dtype {dtype!r} is unknown")
    if not _wholes(shape):
        raise corrupt(f"shape {shape!r}")
    if not _wholes(offsets) or len(offsets) != 2:
        raise corrupt(f"data_offsets {offsets!r}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise corrupt(f"{offsets[1] - offsets[0]} bytes do not make {shape} values of {dtype}")
    return Entry(path=path, name=name, dtype=dtype, shape=tuple(shape), start=base + offsets[0], stop=base + offsets[1])


def _wholes(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refused where a key appears twice: readers differ in which one they take."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twin = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"{twin} appears twice")
    return result


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
