"""What a directory's files hold of a network's weights, checked against `config.json` before any content is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..quant.layouts import WEIGHT, Layout, recognise
from ..quant.scheme import KEY, Scheme
from .files import FLOATS, Entry, find_weights, same_content
from .names import Kind, Place, classify, disk_name, module_names, place, tied_source
from .scheme import read_scheme

_Modules = dict[str, tuple[Place, dict[str, Entry]]]  # what is on disk of one weight, by module


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One matrix (or any tensor that is a whole weight) on disk.

    Fields:
        module: its name on disk without the last part.
        shape: of its values.
        parts: the tensors that stand for it.
        layout: how; None: it is a floating-point tensor, `parts["weight"]`.
        where: its place in the weight, as an index; () is all of it.
    """

    module: str
    shape: tuple[int, ...]
    parts: dict[str, Entry]
    layout: Layout | None
    where: tuple[int | slice, ...] = ()

    @property
    def plain(self) -> Entry:
        """The tensor of a piece without layout."""
        return self.parts[WEIGHT]

    @property
    def first(self) -> tuple[str, int]:
        """File and byte where it starts, to read in the files' order."""
        return min((entry.path.name, entry.start) for entry in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One weight of the network: a single piece, or a fused one whose experts are stored apart."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def layout(self) -> Layout | None:
        """That of all its pieces."""
        return self.pieces[0].layout

    def memory(self, itemsize: int, unpacked: bool = False) -> int:
        """Bytes in memory; floating-point values take `itemsize` each.

        Args:
            unpacked: whether it is made floating-point.
        """
        if self.layout is None or unpacked:
            return math.prod(self.shape) * itemsize
        return self.layout.memory(self.shape)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All weights of a network, by name, and what else is in the files."""

    directory: Path
    weights: dict[str, Weight]
    tied: dict[str, Entry]
    vision: tuple[Entry, ...]
    entries: dict[str, Entry] = field(repr=False)

    @property
    def quantized(self) -> bool:
        """Whether any weight is in few bits."""
        return any(weight.layout is not None for weight in self.weights.values())

    def check_copies(self) -> None:
        """Compares tied copies with what they are copies of; reads both.

        Raises:
            CheckpointError: one differs.
        """
        for name, entry in self.tied.items():
            source = self.entries.get(tied_source(name) or "")
            if source is None or not same_content(entry, source):
                raise CheckpointError(
                    f"{entry.path}: {name} differs from {tied_source(name)}; DiffusionGemma has one set of weights"
                )


def take_inventory(directory: Path, config: ModelConfig, expected: Mapping[str, tuple[int, ...]]) -> Inventory:
    """Reads the headers of a directory's weight files and finds a place for every tensor.

    Args:
        expected: shape of every weight of the network, by name.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of the wrong shape, type or layout; or a file is damaged.
        ConfigError: `quantization_config` describes what is not read.
    """
    scheme = read_scheme(directory, config)
    entries = find_weights(directory)
    own: dict[str, _Modules] = {}
    tied: dict[str, Entry] = {}
    vision: list[Entry] = []
    for name, entry in entries.items():
        kind = classify(name)
        spot = place(name if kind is Kind.OWN else tied_source(name) or "")
        if kind is Kind.VISION:
            vision.append(entry)
        elif kind is Kind.UNUSED:
            continue
        elif spot is None or spot.weight not in expected:
            raise CheckpointError(f"{entry.path}: {name} is unexpected; config.json describes no such tensor")
        elif kind is Kind.TIED:
            tied[name] = entry
        else:
            own.setdefault(spot.weight, {}).setdefault(spot.module, (spot, {}))[1][spot.part] = entry
    missing = [module for name, shape in expected.items() for module in _absent(name, shape, own.get(name, {}))]
    if missing:
        files = sorted({entry.path.name for entry in entries.values()})
        where = f"{directory / files[0]}" if len(files) == 1 else f"{directory} ({len(files)} shards)"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: {missing[0]} is missing{more}")
    weights = {name: _weight(name, shape, own[name]) for name, shape in expected.items()}
    found = Inventory(directory=directory, weights=weights, tied=tied, vision=tuple(vision), entries=entries)
    _check_scheme(found, scheme)
    return found


def _absent(name: str, shape: tuple[int, ...], modules: _Modules) -> Iterator[str]:
    """Names on disk of what a weight lacks."""
    if disk_name(name).removesuffix("." + WEIGHT) in modules:
        return
    if not modules:
        yield disk_name(name)
        return
    for expert in range(shape[0]):
        yield from (f"{module}.{WEIGHT}" for module in module_names(name, expert) if module not in modules)


def _weight(name: str, shape: tuple[int, ...], modules: _Modules) -> Weight:
    """One weight's pieces, checked."""
    modules = dict(modules)
    whole = modules.pop(disk_name(name).removesuffix("." + WEIGHT), None)
    if whole is not None:
        if modules:
            raise _unexpected(modules, f"{disk_name(name)} is there too, fused; one of them is wrong")
        return Weight(name=name, shape=shape, pieces=(_piece(whole, shape, ()),))
    pieces = []
    experts, rows, width = shape
    for expert in range(experts):
        halves = module_names(name, expert)
        each = rows // len(halves)
        for number, module in enumerate(halves):
            where = (expert, slice(number * each, (number + 1) * each))
            pieces.append(_piece(modules.pop(module), (each, width), where))
    if modules:
        raise _unexpected(modules, f"config.json says {experts} experts")
    for piece in pieces:
        if piece.layout != pieces[0].layout:
            path = next(iter(piece.parts.values())).path
            raise CheckpointError(
                f"{path}: {piece.module} is stored otherwise than {pieces[0].module}; "
                "a layer's experts must share one layout"
            )
    return Weight(name=name, shape=shape, pieces=tuple(pieces))


def _piece(found: tuple[Place, dict[str, Entry]], shape: tuple[int, ...], where: tuple[int | slice, ...]) -> Piece:
    spot, parts = found
    plain = parts.get(WEIGHT)
    if len(parts) == 1 and plain is not None:
        if plain.shape != shape:
            raise CheckpointError(
                f"{plain.path}: {plain.name} has shape {list(plain.shape)}; config.json says {list(shape)}"
            )
        if plain.dtype not in FLOATS:
            raise CheckpointError(
                f"{plain.path}: {plain.name} is of type {plain.dtype}; needs one of {', '.join(FLOATS)}, "
                "or the scales that tell what it stands for"
            )
        return Piece(module=spot.module, shape=shape, parts=parts, layout=None, where=where)
    try:
        layout = recognise({part: (entry.dtype, entry.shape) for part, entry in parts.items()}, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{next(iter(parts.values())).path}: {spot.module}.{error}") from None
    return Piece(module=spot.module, shape=shape, parts=parts, layout=layout, where=where)


def _unexpected(modules: _Modules, reason: str) -> CheckpointError:
    _, parts = next(iter(modules.values()))
    entry = next(iter(parts.values()))
    return CheckpointError(f"{entry.path}: {entry.name} is unexpected; {reason}")


def _check_scheme(found: Inventory, scheme: Scheme | None) -> None:
    """Files and `quantization_config` must speak of the same thing."""
    path = found.directory / "config.json"
    for piece in (weight.pieces[0] for weight in found.weights.values()):
        if piece.layout is None:
            continue
        if scheme is None:
            raise ConfigError(f"{path}: {KEY}: missing, but {piece.module} is stored as {piece.layout.name}")
        try:
            scheme.check(piece.layout)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error} ({piece.module})") from None
