"""The packed copy: a network's weights as a CPU holds them, in one file that is mapped instead of read.

One safetensors file in the user's cache directory (`hub.copy_path`). Of a weight in few bits it has `NAME.data`,
`NAME.scales` and so on (`kernels.packed.Packed`), of any other `NAME`, in the type that the network computes in. Its
metadata say what it is a copy of. What takes a multiple of 64 bytes starts at one, as torch's own memory does (products
may round otherwise elsewhere); the rest, a few numbers, comes last and is copied to memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CapacityError, CheckpointError
from ..kernels.packed import CHUNK, LAYOUT, Packed, is_nvfp4
from ..memory import machine_memory
from .files import FLOATS, INDEX, Entry, check_header, read_samples
from .hub import copy_path

FORMAT = "dgemma-packed"
ALIGNED = 64  # bytes
CODES = {getattr(torch, name): code for code, name in FLOATS.items()} | {
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_STEP = 1 << 28  # bytes that are fetched at a time; between two of them Ctrl-C is heard
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which the mmap module does not name

Shapes = Mapping[str, tuple[int, ...]]
Few = dict[str, tuple[int, int | None]]  # bits and group of the weights in few bits, by name


class PackedCopyUnused(UserWarning):
    """A packed copy is not used, or not made; the model is read from its own files."""


class Mapped(NamedTuple):
    """A network's weights in memory that must not be written to (the process would be killed).

    Fields:
        weights: all of them, by name.
        vision: tensors for images that the model's own files have besides.
    """

    weights: dict[str, Tensor | Packed]
    vision: int


def mapped(directory: Path, dtype: torch.dtype, shapes: Shapes, *, quiet: bool) -> Mapped | None:
    """A valid packed copy; that one is not valid is said, unless it is to be replaced quietly."""
    try:
        copy = open_copy(directory)
        return None if copy is None else Mapped(copy.weights(dtype, shapes), copy.vision)
    except CheckpointError as error:
        if not quiet:
            text = f"{error}; this packed copy is not used (--keep-packed replaces it)"
            warnings.warn(text, PackedCopyUnused, stacklevel=2)
        return None


@dataclass(frozen=True, kw_only=True)
class PackedCopy:
    """A packed copy of a model's files as they are now, mapped but not yet read.

    Fields:
        path: of the file; nbytes: of its tensors.
        dtype: of what is not in few bits, by its name in torch.
        vision: see `Mapped`.
    """

    path: Path
    dtype: str
    vision: int
    nbytes: int
    few: Few = field(repr=False)
    entries: dict[str, Entry] = field(repr=False)
    mapping: mmap.mmap = field(repr=False)

    def weights(self, dtype: torch.dtype, shapes: Shapes) -> dict[str, Tensor | Packed]:
        """Every weight of a network of that type and those shapes, its pages in memory.

        Raises:
            CheckpointError: the copy is of another type or of other weights, or cannot be read.
            CapacityError: it is larger than the machine's memory.
        """
        if self.dtype != name_of(dtype):
            raise CheckpointError(f"{self.path}: has numbers in {self.dtype}, not in {name_of(dtype)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            whole = torch.frombuffer(self.mapping, dtype=torch.uint8)
        left = dict(self.entries)

        def take(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            entry = left.pop(name, None)
            if entry is None or (entry.dtype, entry.shape) != (CODES[dtype], shape):
                raise _damaged(self.path)
            part = whole[entry.start : entry.stop]
            return (part.clone() if entry.start % ALIGNED else part).view(dtype).view(shape)

        found: dict[str, Tensor | Packed] = {}
        for name, shape in shapes.items():
            if name not in self.few:
                found[name] = take(name, dtype, shape)
                continue
            bits, group = self.few[name]
            grouped = group is None or (group > 0 and (group % CHUNK == 0 or is_nvfp4(bits, group)))
            if bits not in (4, 8) or not grouped or shape[-1] % (group or 1):
                raise _damaged(self.path)
            parts = {part: take(f"{name}.{part}", *what) for part, what in Packed.parts(shape, bits, group).items()}
            found[name] = Packed(bits=bits, group=group, shape=shape, **parts)
        if left or self.few.keys() - shapes.keys():
            raise _damaged(self.path)
        room = machine_memory()
        if room is not None and self.nbytes > room:
            raise CapacityError(f"{self.path}: {self.nbytes / 1e9:.1f} GB of weights, cpu has {room / 1e9:.1f}")
        _populate(self.path, self.mapping)
        return found


def open_copy(directory: Path) -> PackedCopy | None:
    """The packed copy of a model's files; None: there is none.

    Raises:
        CheckpointError: there is one that is damaged, of another version, or of what the files were before.
    """
    path = copy_path(directory)
    try:
        with path.open("rb") as file:
            entries, about = check_header(path, file)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        source = source_digest(directory)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except CheckpointError:
        raise _damaged(path) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _damaged(path)
    if about.get("layout") != str(LAYOUT):
        raise CheckpointError(f"{path}: is of another version of dgemma")
    if about.get("source") != source:
        raise CheckpointError(f"{path}: is of what the model's files were before")
    try:
        few, vision, dtype = _few(about["few"]), int(about["vision"]), about["dtype"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _damaged(path) from None
    if dtype not in FLOATS.values():
        raise _damaged(path)
    nbytes = sum(entry.nbytes for entry in entries.values())
    return PackedCopy(
        path=path, dtype=dtype, vision=vision, nbytes=nbytes, few=few, entries=entries, mapping=mapping
    )  # fmt: skip


def source_digest(directory: Path) -> str:
    """What a model's weights are known by: its settings; sizes, times and samples of its weight files.

    Times alone say nothing where a tool sets them all alike, samples alone nothing of a change elsewhere.
    """
    digest = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))
    for path in [*files, *directory.glob(INDEX)]:
        digest.update(f"{path.stat().st_mtime_ns} ".encode())
        for sample in read_samples(path):
            digest.update(sample)
    return digest.hexdigest()


def name_of(dtype: torch.dtype) -> str:
    """A dtype by its name in torch."""
    return str(dtype).removeprefix("torch.")


def _damaged(path: Path) -> CheckpointError:
    """The error for a copy that makes no sense."""
    return CheckpointError(f"{path}: is damaged")


def _few(text: str) -> Few:
    few = dict(json.loads(text))
    for bits, group in few.values():
        if type(bits) is not int or not (group is None or type(group) is int):
            raise ValueError(text)
    return {name: (bits, group) for name, (bits, group) in few.items()}


def _populate(path: Path, mapping: mmap.mmap) -> None:
    """Has every page in memory and at hand, so that a loaded network is a ready one: at the speed of the disk, or at
    once if another process, or the last one, has them there.

    Raises:
        CheckpointError: the disk fails.
    """
    if sys.platform != "linux":
        return
    for start in range(0, len(mapping), _STEP):
        try:
            mapping.madvise(_POPULATE_READ, start, min(_STEP, len(mapping) - start))
        except OSError as error:
            if error.errno in (errno.EFAULT, errno.EIO):
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
            return  # an older kernel: each page comes when it is first touched
