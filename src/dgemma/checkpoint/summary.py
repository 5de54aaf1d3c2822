"""What a model directory holds and what it takes to run it, from `config.json` and file headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..memory import machine_memory
from .files import find_weights, has_weights
from .names import Kind, classify

CONTEXT = 8192
# Bits a weight of the matrices. The integer formats carry a 16-bit scale for each group of 32 weights. What is no
# matrix (norms, scalars, scales) stays at 16 bits in every format but float32; it is less than a thousandth.
_FORMATS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.5, "int4": 4.5}


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
        memory: one entry a format, float32 to int4.
        machine_memory: bytes of this machine's memory, None where it cannot be told.
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
    memory: tuple[FormatMemory, ...]
    machine_memory: int | None

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
        memory=tuple(format_memory(config, name, context, machine) for name in _FORMATS),
        machine_memory=machine,
    )


def format_memory(config: ModelConfig, name: str, context: int, machine: int | None) -> FormatMemory:
    """Memory of weights in one format and of one sequence's cache; an estimate for the integer formats.

    The cache holds 16-bit keys and values (32-bit for float32 weights): of all tokens in full layers, of the window
    in sliding ones.
    """
    small = config.parameters()["norms and scalars"]
    matrices = config.total_parameters() - small
    wide = name == "float32"
    weights = int(matrices * _FORMATS[name] / 8) + small * (4 if wide else 2)
    full, sliding = config.cache_bytes_per_token(4 if wide else 2)
    cache = full * context + sliding * min(context, config.sliding_window)
    return FormatMemory(
        name=name, weights=weights, cache=cache, fits=None if machine is None else weights + cache <= machine
    )
