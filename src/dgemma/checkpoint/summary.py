"""What a model directory holds and what it takes to run it, from `config.json` and file headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..errors import CheckpointError
from ..memory import machine_memory
from ..quant import FORMATS, Policy
from ..quant.layouts import SCALE, ZERO
from ..quant.scheme import Scheme
from .files import Entry, find_weights, has_weights
from .hub import copy_path
from .names import Kind, Place, classify, place
from .scheme import read_scheme

CONTEXT = 8192
STORED = "as stored"
_KINDS = {
    "embedding": "embedding",
    "attention": "attention",
    "dense MLP": "mlp",
    "experts": "experts",
    "router": "router",
    "self-conditioning": "conditioning",
}
_SCALE_BITS = 32  # in memory


@dataclass(frozen=True, kw_only=True)
class FormatMemory:
    """Memory in one format, in bytes; `fits` compares with the machine's memory, None where that is unknown."""

    name: str
    weights: int
    cache: int
    fits: bool | None

    @property
    def total(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache


@dataclass(frozen=True, kw_only=True)
class CopyFile:
    """A model's packed copy: its path, bytes on disk, and why it is not used, None if it is."""

    path: Path
    nbytes: int
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A model directory in figures.

    Fields:
        directory, config: what was read.
        parameters: weights by part; with "vision" where the files hold any.
        total, active: weights of the text network, and those that one token uses.
        stored: bytes on disk by type (`BF16`, ...), vision and tied copies included; empty without weight files.
        files, tensors: numbers of weight files and of tensors in them.
        vision_tensors: how many of them are for images; they are not loaded.
        context: tokens that the cache is counted for.
        scheme: of weights in few bits; None where there are none.
        memory: one entry a format, float32 to int4; before them, where the weights are in few bits, "as stored".
        machine_memory: bytes of this machine's memory, None where it cannot be told.
        packed: the packed copy that a CPU maps (`kept.py`); None: there is none.
    """

    directory: Path
    config: ModelConfig
    parameters: dict[str, int]
    total: int
    active: int
    stored: dict[str, int]
    files: int
    tensors: int
    vision_tensors: int
    context: int
    scheme: Scheme | None
    memory: tuple[FormatMemory, ...]
    machine_memory: int | None
    packed: CopyFile | None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(self.stored.values())


def summarize(directory: Path, *, context: int = CONTEXT) -> Summary:
    """Reads a model directory's `config.json` and, where there are weights, the headers of their files.

    Raises:
        ConfigError: `config.json` is missing or wrong.
        CheckpointError: a weight file is damaged.
    """
    directory = Path(directory)
    config = ModelConfig.read(directory / "config.json")
    entries = find_weights(directory) if has_weights(directory) else {}
    stored: dict[str, int] = {}
    for entry in entries.values():
        stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.nbytes
    vision = [entry for entry in entries.values() if classify(entry.name) is Kind.VISION]
    parameters = config.parameters()
    if vision:
        parameters["vision"] = sum(entry.numel for entry in vision)
    machine = machine_memory()
    scheme = read_scheme(directory, config)
    memory = [format_memory(config, name, context, machine) for name in ("float32", "bfloat16", *reversed(FORMATS))]
    if scheme is not None and entries:
        held = sum(_held(spot, entries) for name in entries if (spot := place(name)) is not None)
        memory.insert(0, _memory(STORED, held, memory[1].cache, machine))
    return Summary(
        directory=directory,
        config=config,
        parameters=parameters,
        total=config.total_parameters(),
        active=config.active_parameters(),
        stored=dict(sorted(stored.items(), key=lambda item: -item[1])),
        files=len({entry.path for entry in entries.values()}),
        tensors=len(entries),
        vision_tensors=len(vision),
        context=context,
        scheme=scheme,
        memory=tuple(memory),
        machine_memory=machine,
        packed=_packed(directory),
    )


def _packed(directory: Path) -> CopyFile | None:
    path = copy_path(directory)
    if not path.is_file():
        return None
    from .kept import open_copy  # with torch, which takes its second only where there is a copy

    try:
        open_copy(directory)
        problem = None
    except CheckpointError as error:
        problem = str(error).removeprefix(f"{path}: ")
    return CopyFile(path=path, nbytes=path.stat().st_size, problem=problem)


def format_memory(config: ModelConfig, name: str, context: int, machine: int | None) -> FormatMemory:
    """Memory of weights in one format and of one sequence's cache.

    Formats in few bits are what `dgemma quantize` makes by default: a scale for each 64 inputs in int4, else one a
    row; kinds that it keeps at 16 bits. The cache holds 16-bit keys and values (32-bit for float32 weights): of all
    tokens in full layers, of the window in sliding ones.
    """
    wide = 32 if name == "float32" else 16
    bits = 0.0
    for part, count in config.parameters().items():
        choice = Policy(format=name).choice(_KINDS.get(part)) if name in FORMATS else "keep"
        each = {"int4": 4 + _SCALE_BITS / 64, "keep": wide}.get(choice, 8 + _SCALE_BITS / config.hidden_size)
        bits += count * each
    full, sliding = config.cache_bytes_per_token(wide // 8)
    return _memory(name, int(bits / 8), full * context + sliding * min(context, config.sliding_window), machine)


def _memory(name: str, weights: int, cache: int, machine: int | None) -> FormatMemory:
    fits = None if machine is None else weights + cache <= machine
    return FormatMemory(name=name, weights=weights, cache=cache, fits=fits)


def _held(spot: Place, entries: dict[str, Entry]) -> int:
    """Bytes in memory of one tensor on disk: see `quant.layouts.Layout`; floating-point tensors at 16 bits."""
    name = spot.module if spot.module in entries else f"{spot.module}.{spot.part}"
    entry = entries[name]
    if spot.part == SCALE and entry.dtype == "F8_E4M3":  # NVFP4, and what stands for its second scale: one a row
        return entry.nbytes + entry.shape[0] * _SCALE_BITS // 8
    if spot.part == SCALE:
        return entry.numel * _SCALE_BITS // 8
    if entry.dtype not in ("U8", "I8", "I32", "I64", "F8_E4M3"):
        return entry.numel * 2
    return entry.nbytes * (2 if f"{spot.module}.{ZERO}" in entries else 1)  # with zero points, a byte a value
