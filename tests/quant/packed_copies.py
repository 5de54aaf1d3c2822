"""What the tests of packed copies share: where weights are, whether they are the same, what is said."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dgemma.checkpoint.kept import PackedCopyUnused
from dgemma.kernels.cpu import Packed


@contextlib.contextmanager
def words() -> Iterator[list[str]]:
    """What is said of packed copies."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if one.category is PackedCopyUnused]


def mapping(path: Path, process: int | str = "self") -> dict[str, str]:
    """What the system says of a file's mapping in a process: its place, rights and kB by kind; {} if there is none."""
    found: dict[str, str] = {}
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) (....) ", line):
            if found:
                return found
            inside = line.endswith(f" {path}")
            if inside:
                found = {"start": place[1], "stop": place[2], "rights": place[3]}
        elif found:
            name, _, value = line.partition(":")
            found[name] = value.strip().removesuffix(" kB")
    return found


def packed_of(network: Any) -> list[torch.Tensor]:
    """The bytes of its matrices in few bits."""
    return [
        part.view(torch.uint8) for _, weight in sorted(network.quantized().items()) for part in weight.tensors.values()
    ]


def is_mapped(network: Any, path: Path) -> bool:
    """Whether the matrices in few bits are in the file's own pages; all of them, or none."""
    where = mapping(path)
    start, stop = (int(where[end], 16) for end in ("start", "stop")) if where else (0, 0)
    inside = {start <= tensor.data_ptr() < stop for tensor in packed_of(network)}
    assert len(inside) == 1
    return inside.pop()


def same(found: Any, wanted: Any) -> bool:
    """Whether two networks have the same weights, bit for bit, held alike."""
    few, many = found.quantized(), wanted.quantized()
    assert few.keys() == many.keys() and all(isinstance(weight, Packed) for weight in few.values())
    held = all((few[n].bits, few[n].group, few[n].shape) == (many[n].bits, many[n].group, many[n].shape) for n in few)
    plain, others = found.state_dict(), wanted.state_dict()
    assert plain.keys() == others.keys()
    pairs = [*zip(packed_of(found), packed_of(wanted), strict=True), *((plain[name], others[name]) for name in plain)]
    return held and all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.is_dir() else []
