"""A copy of a checkpoint in few bits, made matrix by matrix in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from ..quant import ErrorSum, Policy, Quantized, kind_of, quantize, to_fp8
from ..quant.codec import encode
from ..quant.layouts import FLOAT, SHAPE, WEIGHT, Layout, written
from ..quant.policy import KEEP
from ..quant.scheme import KEY, write
from .files import FLOATS, Entry, read_blocks
from .inventory import Inventory, Piece, Weight, take_inventory
from .load import config_dtype, empty_network, read_quantized, read_tensor
from .names import module_names
from .resumable import Item, Measured, Progress, Resumable
from .save import TEXT_FILES
from .writer import Block, size_of

SHARD = 2e9  # bytes; as much as is done again after an interruption
_BLOCK = 1 << 24  # weights that are rounded at a time
Rows = Callable[[int], Iterator[Tensor]]  # reads a matrix's rows, so many at a time
_CODES = {name: code for code, name in FLOATS.items()}


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a run has made.

    Fields:
        destination: the directory.
        nbytes: of all tensors on disk.
        group: inputs that share a scale in 4 bits; None: whole rows, or nothing is in 4 bits.
        errors: by kind of weight, of those in few bits.
        layouts: the same kinds' layouts.
    """

    destination: Path
    nbytes: int
    group: int | None
    errors: dict[str, ErrorSum]
    layouts: dict[str, Layout]


def quantize_checkpoint(
    source: Path,
    destination: Path,
    policy: Policy,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
    max_shard_bytes: float = SHARD,
) -> Done:
    """Writes a copy of a checkpoint with its matrices in few bits, in the layouts of compressed-tensors.

    Experts are written one by one, as `experts.7.gate_proj`: what vLLM and the tools that others quantise with expect.
    Tensors for images, tokenizer and templates come along unchanged. At most some 16 million weights are in memory
    at a time. A run that was interrupted goes on with the shard that it was at.

    Args:
        source: a model directory, in floating point or already in few bits (which then are rounded again).
        destination: a directory that is not there yet.
        report: told the progress.
        max_shard_bytes: above this the weights are split.

    Raises:
        ConfigError: the policy does not suit the model, or `config.json` is wrong.
        CheckpointError: the source is damaged, or the destination exists or cannot be written.
        CapacityError: the disk has no room.
    """
    source = Path(source)
    config = ModelConfig.read(source / "config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_network(config).state_dict().items()}
    found = take_inventory(source, config, shapes)
    found.check_copies()
    layouts, group = plan(policy, shapes)
    items = list(_items(found, config, policy, layouts))
    small = {
        name: (source / name).read_bytes()
        for name in (*TEXT_FILES, "generation_config.json")
        if (source / name).is_file()
    }
    stats = {path.name: path.stat() for path in {entry.path for entry in found.entries.values()}}
    settings = {
        "policy": asdict(policy),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())},
    }
    work = Resumable(Path(destination), items, settings, max_shard_bytes)
    measured = work.run(report)
    small["config.json"] = (json.dumps(config.raw | {KEY: write(layouts)}, indent=2) + "\n").encode()
    work.finish(small)
    errors = {kind: ErrorSum(**figures) for kind, figures in measured.items()}  # type: ignore[arg-type]
    ordered = {kind: errors[kind] for kind in layouts if kind in errors}
    return Done(destination=work.destination, nbytes=work.nbytes, group=group, errors=ordered, layouts=layouts)


def plan(policy: Policy, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Layout], int | None]:
    """The layout of each kind that is not kept, for a network's weights; and the group size of 4 bits.

    Raises:
        ConfigError: no group size divides the widths.
    """
    kinds = {name: kind for name in shapes if (kind := kind_of(name)) is not None}
    narrow = {name: shapes[name][-1] for name, kind in kinds.items() if policy.choice(kind) == "int4"}
    group = policy.group_for(narrow) if narrow else None
    chosen = {kind: policy.choice(kind) for kind in dict.fromkeys(kinds.values())}
    return {kind: written(choice, kind, group) for kind, choice in chosen.items() if choice != KEEP}, group


def matrix_item(
    module: str,
    layout: Layout,
    shape: tuple[int, int],
    blocks: Callable[[Measured], Iterator[Quantized]],
) -> Item:
    """One matrix [O, I] on its way to disk; `blocks` makes it, some rows at a time."""
    headers = {f"{module}.{part}": header for part, header in layout.headers(shape).items()}

    def encoded(measured: Measured) -> Iterator[tuple[str, Block]]:
        for rows in blocks(measured):
            parts = encode(layout, rows)
            for part in parts.keys() - {SHAPE}:
                yield f"{module}.{part}", _bytes(parts[part])
        if f"{module}.{SHAPE}" in headers:
            yield f"{module}.{SHAPE}", _bytes(torch.tensor(shape))

    return Item(headers=headers, blocks=encoded)


def tensor_item(name: str, dtype: str, shape: tuple[int, ...], blocks: Callable[[], Iterator[Block]]) -> Item:
    """One plain tensor on its way to disk."""
    return Item(headers={name: (dtype, shape)}, blocks=lambda measured: ((name, block) for block in blocks()))


def _items(found: Inventory, config: ModelConfig, policy: Policy, layouts: dict[str, Layout]) -> Iterator[Item]:
    """Everything that goes into the copy, in the order of the source's files."""
    for name, weight in sorted(found.weights.items(), key=lambda item: item[1].pieces[0].first):
        kind = kind_of(name)
        layout = layouts.get(kind or "")
        if layout is None:
            yield from (_kept(piece, config) for piece in weight.pieces)
            continue
        assert kind is not None
        for module, shape, rows in _matrices(weight):
            make = partial(_rounded, kind, module, layout, shape, rows, policy.search)
            yield matrix_item(module, layout, shape, make)
    for entry in found.vision:
        yield _copied(entry)


def _matrices(weight: Weight) -> Iterator[tuple[str, tuple[int, int], Rows]]:
    """A weight's matrices: module name, shape, and what reads their rows."""
    if len(weight.pieces) > 1 or len(weight.shape) == 2:
        for piece in weight.pieces:
            yield piece.module, (piece.shape[0], piece.shape[1]), partial(_piece_rows, piece)
        return
    experts, rows, width = weight.shape
    entry = weight.pieces[0].plain
    for expert in range(experts):
        modules = module_names(weight.name, expert)
        each = rows // len(modules)
        for number, module in enumerate(modules):
            start = expert * rows + number * each
            yield module, (each, width), partial(_entry_rows, entry, width, start, each)


def _piece_rows(piece: Piece, step: int) -> Iterator[Tensor]:
    """A matrix's rows, so many at a time."""
    rows, width = piece.shape
    if piece.layout is None:
        yield from _entry_rows(piece.plain, width, 0, rows, step)
        return
    whole = read_quantized(piece)
    for first in range(0, rows, step):
        yield whole[first : first + step].dequantize()


def _entry_rows(entry: Entry, width: int, start: int, count: int, step: int) -> Iterator[Tensor]:
    """`count` rows of a floating-point tensor, all its leading axes taken as one, so many at a time."""
    size = size_of(entry.dtype, (width,))
    for first in range(start, start + count, step):
        last = min(first + step, start + count)
        place = (entry.start + first * size, entry.start + last * size)
        yield read_tensor(replace(entry, shape=(last - first, width), start=place[0], stop=place[1]))


def _rounded(
    kind: str,
    module: str,
    layout: Layout,
    shape: tuple[int, int],
    rows: Rows,
    search: bool,
    measured: Measured,
) -> Iterator[Quantized]:
    """A matrix in few bits, some rows at a time, with what that costs."""
    sums = ErrorSum(**measured.get(kind, {}))  # type: ignore[arg-type]
    for some in rows(max(1, _BLOCK // shape[1])):
        if not bool(torch.isfinite(some).all()):
            raise CheckpointError(f"{module}: holds NaN or infinity; the source is damaged")
        if layout.name == FLOAT:
            found = to_fp8(some)
        else:
            found = quantize(some, bits=layout.bits, group=layout.group, search=search)
        sums.add(some, found, sum(size_of(*header) for header in layout.headers((len(some), shape[1])).values()))
        yield found
    measured[kind] = asdict(sums)


def _kept(piece: Piece, config: ModelConfig) -> Item:
    """A tensor as it is; one that the source has in few bits becomes floating-point."""
    if piece.layout is None:
        return _copied(piece.plain)
    dtype = config_dtype(config)

    def blocks() -> Iterator[Block]:
        yield _bytes(read_quantized(piece).dequantize().to(dtype))

    code = _CODES[str(dtype).removeprefix("torch.")]
    return tensor_item(f"{piece.module}.{WEIGHT}", code, piece.shape, blocks)


def _copied(entry: Entry) -> Item:
    return tensor_item(entry.name, entry.dtype, entry.shape, lambda: read_blocks(entry))


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
