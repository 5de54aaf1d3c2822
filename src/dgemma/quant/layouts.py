"""How weights in few bits lie on disk: which tensors stand for one matrix, recognised by their names, types and shapes.

Published layouts (compressed-tensors, and NVIDIA ModelOpt for NVFP4); `module` stands for a name such as
`model.decoder.layers.0.mlp.up_proj`, O and I for the matrix's rows and width:

| layout | tensors |
|---|---|
| pack-quantized | `module.weight_packed` I32 [O, I * bits / 32], value + 2^(bits-1) each, the first in the lowest bits; `weight_scale`; `weight_shape`; `weight_zero_point` where they are not symmetric |
| int-quantized | `module.weight` I8 [O, I]; `weight_scale` |
| float-quantized | `module.weight` F8_E4M3 [O, I]; `weight_scale` |
| nvfp4-pack-quantized | `module.weight_packed` U8 [O, I/2], two E2M1 a byte; `weight_scale` F8_E4M3 [O, I/16]; `weight_global_scale`, which divides |
| modelopt-nvfp4 | `module.weight`, as `weight_packed` above; `weight_scale` the same; `weight_scale_2`, which multiplies |

A `weight_scale` is [O, I/group], [O, 1] or [O] (a row each), or one number.
"""  # noqa: E501 - a table

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CheckpointError

PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MODELOPT = "nvfp4-pack-quantized", "modelopt-nvfp4"
WEIGHT, PACKED, SCALE, SHAPE = "weight", "weight_packed", "weight_scale", "weight_shape"
ZERO, GLOBAL, SECOND = "weight_zero_point", "weight_global_scale", "weight_scale_2"
PARTS = (WEIGHT, PACKED, SCALE, SHAPE, ZERO, GLOBAL, SECOND)
NVFP4_GROUP = 16

Header = tuple[str, tuple[int, ...]]  # a tensor's type, as safetensors calls it, and its shape
_SCALE_TYPES = ("BF16", "F16", "F32")
_NEEDED = {
    PACK: {PACKED, SCALE, SHAPE},
    INT: {WEIGHT, SCALE},
    FLOAT: {WEIGHT, SCALE},
    NVFP4: {PACKED, SCALE, GLOBAL},
    MODELOPT: {WEIGHT, SCALE, SECOND},
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One matrix's layout on disk, and what it becomes in memory (`quant.Quantized`).

    Fields:
        name: of the layout, above.
        stored_bits: a value on disk.
        bits, group: in memory. 4 bits with zero points are held in 8 bits, exactly: value - zero point is a whole
            number of at most 15.
    """

    name: str
    stored_bits: int
    bits: int
    group: int | None

    @property
    def nvfp4(self) -> bool:
        """Whether it is one of NVFP4's: E2M1 codes and scales of two levels."""
        return self.name in (NVFP4, MODELOPT)

    def memory(self, shape: tuple[int, ...]) -> int:
        """Bytes of a matrix in memory with its scales: float32, in NVFP4 a byte a group and float32 a row."""
        rows, width = math.prod(shape[:-1]), shape[-1]
        scales = width // self.group if self.group else 1
        return rows * (width * self.bits // 8 + (scales + 4 if self.nvfp4 else 4 * scales))

    def headers(self, shape: tuple[int, int]) -> dict[str, Header]:
        """The tensors that a matrix is written as, by part."""
        rows, width = shape
        scale: Header = ("BF16", (rows, width // self.group if self.group else 1))
        match self.name:
            case "pack-quantized":
                words = math.ceil(width * self.bits / 32)
                return {PACKED: ("I32", (rows, words)), SCALE: scale, SHAPE: ("I64", (2,))}
            case "int-quantized":
                return {WEIGHT: ("I8", shape), SCALE: scale}
            case "float-quantized":
                return {WEIGHT: ("F8_E4M3", shape), SCALE: scale}
        raise AssertionError(f"{self.name} is read only")


def written(choice: str, kind: str, group: int | None) -> Layout:
    """The layout that a kind of weight is written in for a choice of int4, int8 or fp8.

    An embedding's rows are looked up and not multiplied with, so its values are packed: the layout that others give
    to weights whose inputs stay as they are.
    """
    if choice == "int4":
        return Layout(name=PACK, stored_bits=4, bits=4, group=group)
    if choice == "fp8":
        return Layout(name=FLOAT, stored_bits=8, bits=8, group=None)
    return Layout(name=PACK if kind == "embedding" else INT, stored_bits=8, bits=8, group=None)


def recognise(parts: Mapping[str, Header], shape: tuple[int, ...]) -> Layout:
    """The layout of a matrix of this shape.

    Args:
        parts: headers by the name's last part; at least one that a plain weight does not have.

    Raises:
        CheckpointError: a part is missing, unexpected, or does not fit; the message begins with the part.
    """
    name = _name(parts)
    for part in sorted(_NEEDED[name] - parts.keys()):
        raise CheckpointError(f"{part} is missing; {name} needs it")
    for part in sorted(parts.keys() - _NEEDED[name] - {SHAPE, ZERO}):
        raise CheckpointError(f"{part} is unexpected beside {name} weights")
    if len(shape) != 2:
        raise CheckpointError(f"{PACKED if PACKED in parts else WEIGHT} stands for {list(shape)}, which is no matrix")
    rows, width = shape
    if ZERO in parts and name != PACK:
        raise CheckpointError(f"{ZERO} is not supported in {name}; only symmetric values are read")
    if name in (NVFP4, MODELOPT):
        return _nvfp4(parts, name, rows, width)
    group = _group(parts[SCALE], rows, width)
    if name != PACK:
        _expect(parts, WEIGHT, (rows, width))
        return Layout(name=name, stored_bits=8, bits=8, group=group)
    found = next((b for b in (4, 8) if parts[PACKED][1] == (rows, math.ceil(width * b / 32))), None)
    if found is None:
        raise CheckpointError(
            f"{PACKED} has shape {list(parts[PACKED][1])}; for {rows} × {width} values of 4 or 8 bits that does not fit"
        )
    if found == 4 and width % 2:
        raise CheckpointError(f"{PACKED} is {width} values wide; 4-bit values are read in pairs")
    if ZERO in parts:
        if found == 8:
            raise CheckpointError(f"{ZERO} is not supported for 8 bits; only symmetric values are read")
        _expect(parts, ZERO, (math.ceil(rows / 8), width // group if group else 1), "I32")
        return Layout(name=PACK, stored_bits=4, bits=8, group=group)
    return Layout(name=PACK, stored_bits=found, bits=found, group=group)


def _name(parts: Mapping[str, Header]) -> str:
    kind = parts.get(PACKED, parts.get(WEIGHT, ("", ())))[0]
    names = {"I32": PACK, "U8": NVFP4} if PACKED in parts else {"I8": INT, "F8_E4M3": FLOAT, "U8": MODELOPT}
    if kind in names and not (kind == "U8" and parts.get(SCALE, ("F8_E4M3",))[0] != "F8_E4M3"):
        return names[kind]
    if PACKED not in parts and WEIGHT not in parts:
        raise CheckpointError(f"{min(parts)} is there, but no {PACKED} or {WEIGHT}")
    read = ", ".join(_NEEDED)
    raise CheckpointError(f"{PACKED if PACKED in parts else WEIGHT} is of type {kind}, with a layout not read ({read})")


def _nvfp4(parts: Mapping[str, Header], name: str, rows: int, width: int) -> Layout:
    if width % NVFP4_GROUP:
        raise CheckpointError(f"{SCALE} goes with groups of {NVFP4_GROUP}, which {width} does not divide into")
    _expect(parts, PACKED if name == NVFP4 else WEIGHT, (rows, width // 2))
    _expect(parts, SCALE, (rows, width // NVFP4_GROUP))
    second = GLOBAL if name == NVFP4 else SECOND
    kind, shape = parts[second]
    if kind != "F32" or math.prod(shape) != 1:
        raise CheckpointError(f"{second} is {kind} {list(shape)}; needs one number of type F32")
    return Layout(name=name, stored_bits=4, bits=4, group=NVFP4_GROUP)


def _group(scale: Header, rows: int, width: int) -> int | None:
    """Inputs that share a scale; None where that is a row, or all of the matrix."""
    kind, shape = scale
    if kind not in _SCALE_TYPES:
        raise CheckpointError(f"{SCALE} is of type {kind}; needs one of {', '.join(_SCALE_TYPES)}")
    if shape in ((), (1,), (rows,), (rows, 1), (1, 1)):
        return None
    if len(shape) == 2 and shape[0] == rows and shape[1] and width % shape[1] == 0:
        return width // shape[1]
    raise CheckpointError(
        f"{SCALE} has shape {list(shape)}; a {rows} × {width} matrix needs one number, one a row, or one a group"
    )


def _expect(parts: Mapping[str, Header], part: str, shape: tuple[int, ...], kind: str | None = None) -> None:
    found_kind, found = parts[part]
    if found != shape or found_kind != (kind or found_kind):
        raise CheckpointError(f"{part} is {found_kind} {list(found)}; config.json asks for {list(shape)}")
