"""Weights from disk into a network, one tensor at a time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import ModelConfig
from ..errors import CapacityError, CheckpointError, ConfigError
from ..kernels import cpu
from ..kernels.packed import CHUNK, can_pack
from ..memory import machine_memory, streamed_bytes
from ..model import Network
from ..model.moe import Experts
from ..model.offload import ExpertStream, shelved
from ..model.ranks import Ranks
from ..quant import Quantized, quantize
from ..quant.codec import decode, plain_part
from .files import FLOATS, Entry, expect, read_into
from .inventory import Inventory, Piece, Weight, take_inventory
from .keeper import Keeper, at_hand
from .names import VisionIgnored

TYPES = {code: getattr(torch, name) for code, name in FLOATS.items()} | {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def load_network(
    directory: Path,
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    ranks: Ranks | None = None,
    offload: bool = False,
    keep_packed: bool = False,
) -> Network:
    """Builds the network and fills it from the directory's safetensors files, strictly and in bounded memory.

    At most the network and one more tensor (as it is on disk) are in memory at any time. Every check that needs no
    tensor's content is done before the first one is read. Weights in few bits stay so (`kernels.cpu.Weight`). What the
    CPU kernels do not multiply with becomes int8 on a CPU: FP8 with a scale a row, groups of other sizes with one for
    each 32. A whole network on a CPU is mapped instead where there is a valid packed copy (`kept.py`).

    Args:
        directory: where the weights are; see `files.find_weights`.
        config: sizes; every tensor must be there in exactly the shape that follows from them.
        device: where the tensors go, each as soon as it is read.
        dtype: floating-point type of the loaded tensors and of activations; None is what `config.json` says
            (`config.dtype`).
        dequantize: make weights in few bits floating-point, for training and comparisons.
        ranks: for a network in parts, this process's place: of each matrix only its own part is kept.
        offload: leave the experts in host memory, as they are on disk, and stream them to the device
            (`model/offload.py`); not for a network in parts, nor one that is made floating-point.
        keep_packed: make a packed copy for later starts if there is no valid one; of a whole network in few bits, on a
            CPU.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or type, differs from the tensor it is
            a copy of, or a norm, scalar or scale is not finite; or a file is damaged. Names the tensor and the file.
        ConfigError: `quantization_config` is missing, or describes what is not read; or a packed copy is asked for of
            a model without weights in few bits.
        CapacityError: the weights do not fit the device's memory, or the host's; said before any of it is taken.

    Warns:
        VisionIgnored: once, when the files also hold weights for images.
        PackedCopyUnused: there is a packed copy that is not valid, or none is made though it is asked for.
    """
    dtype = config_dtype(config) if dtype is None else dtype
    device, directory = torch.device(device), Path(directory)
    network = empty_network(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    mappable = device.type == "cpu" and ranks is None and not dequantize
    assert not (offload and (ranks or dequantize)) and (mappable or not keep_packed)
    with contextlib.ExitStack() as stack:
        keeper = None
        if mappable:
            copy = stack.enter_context(at_hand(directory, dtype, shapes, keep=keep_packed))
            if isinstance(copy, Keeper):
                keeper = copy
            elif copy is not None:
                for name, held in copy.weights.items():
                    _put(network, name, held)
                _say_vision(directory, copy.vision)
                return network
        found = take_inventory(directory, config, shapes)
        if keep_packed and not found.quantized:
            raise ConfigError(
                "keep_packed: no weight of the model is in few bits; `dgemma quantize` makes a copy of it"
            )
        _check_room(found, device, dtype, dequantize, 1 if ranks is None else ranks.size, offload)
        if ranks is not None:
            network = empty_network(config, ranks)
        found.check_copies()
        if keeper is not None:
            nbytes = sum(weight.memory(dtype.itemsize) for weight in found.weights.values())
            keeper.begin(found.weights, nbytes, len(found.vision))
        for name, weight in _weights(found, device, dtype, dequantize, ranks, offload):
            _put(network, name, weight)
            if keeper is not None:
                keeper.add(name, weight)
        if keeper is not None:
            keeper.finish()
    if offload:
        experts = [module for module in network.modules() if isinstance(module, Experts)]
        network.expert_stream = ExpertStream(experts, device)
    _say_vision(directory, len(found.vision))
    return network


def _weights(
    found: Inventory, device: torch.device, dtype: torch.dtype, dequantize: bool, ranks: Ranks | None, offload: bool
) -> Iterator[tuple[str, torch.Tensor | cpu.Weight]]:
    """Every weight by its name in the network, as it is held; see `load_network`."""
    away = {name for name in found.weights if _is_experts(name)} if offload else set()
    converted = {
        name
        for name, weight in found.weights.items()
        if weight.layout is None
        and (device.type != "cpu" or name in away or TYPES[weight.pieces[0].plain.dtype] != dtype)
    }
    largest = max((piece.plain.nbytes for name in converted for piece in found.weights[name].pieces), default=0)
    # One buffer for all tensors that are not used as they are: many that come and go would leave holes in the heap.
    buffer = torch.empty(largest, dtype=torch.uint8, device="cpu")
    # The files' own order: reading runs forward through each shard.
    order = sorted(found.weights.items(), key=lambda item: item[1].pieces[0].first)
    for (name, weight), (_, following) in zip(order, [*order[1:], order[-1]], strict=True):
        expect(entry for piece in following.pieces for entry in piece.parts.values())
        if name in away:
            yield name, shelved(_away(weight, buffer, dtype), device)
        elif ranks is not None:
            yield name, _part(weight, name, ranks, device, dtype)
        elif weight.layout is None:
            yield name, _floating(weight, buffer if name in converted else None, device, dtype)
        elif dequantize:
            whole = torch.empty(weight.shape, dtype=dtype, device=device)
            for piece in weight.pieces:
                whole[piece.where] = read_quantized(piece).dequantize().to(device=device, dtype=dtype)
            yield name, whole
        else:
            held = _quantized(weight, device)
            yield name, cpu.pack(held) if device.type == "cpu" else held


def empty_network(config: ModelConfig, ranks: Ranks | None = None) -> Network:
    """The network on the meta device: shapes without memory."""
    with torch.device("meta"), _Unfilled():
        return Network(config, ranks)


def config_dtype(config: ModelConfig) -> torch.dtype:
    """The floating-point type that `config.json` names.

    Raises:
        ConfigError: it names another kind of type.
    """
    if config.dtype not in FLOATS.values():
        raise ConfigError(f"dtype: {config.dtype!r} is not one of {', '.join(FLOATS.values())}")
    result: torch.dtype = getattr(torch, config.dtype)
    return result


def read_tensor(entry: Entry, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """One tensor as it is on disk, in memory of its own or in a buffer of bytes that is large enough.

    Raises:
        CheckpointError: the file can't be read, or a norm or scalar is not finite.
    """
    dtype = TYPES[entry.dtype]
    if buffer is None:
        tensor = torch.empty(entry.shape, dtype=dtype, device="cpu")
    else:
        tensor = buffer[: entry.nbytes].view(dtype).view(entry.shape)
    if entry.nbytes:
        array: Any = tensor.view(-1).view(torch.uint8).numpy()
        read_into(entry, memoryview(array))
    if tensor.dim() == 1 and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{entry.path}: {entry.name} holds NaN or infinity; the file is damaged")
    return tensor


def read_quantized(piece: Piece, target: Quantized | None = None) -> Quantized:
    """One matrix in few bits, exactly as it is stored.

    Args:
        target: contiguous memory for it on the CPU; its `data` is read straight into where the layout allows that.

    Raises:
        CheckpointError: the file can't be read, or its content makes no sense.
    """
    assert piece.layout is not None
    rows, width = piece.shape
    plain = plain_part(piece.layout)
    buffers: dict[str, torch.Tensor] = {}
    if target is not None and plain is not None and target.data.nbytes == piece.parts[plain].nbytes:
        buffers[plain] = target.data.view(-1).view(torch.uint8)
    tensors = {part: read_tensor(entry, buffers.get(part)) for part, entry in piece.parts.items()}
    try:
        return decode(piece.layout, tensors, (rows, width))
    except CheckpointError as error:
        raise CheckpointError(f"{next(iter(piece.parts.values())).path}: {piece.module}.{error}") from None


def _say_vision(directory: Path, count: int) -> None:
    if count:
        warnings.warn(
            f"{directory}: left {count} tensors for images on disk; text works, images do not",
            VisionIgnored,
            stacklevel=3,
        )


def _is_experts(name: str) -> bool:
    return name.split(".")[-2:-1] == ["experts"]


def _check_room(
    found: Inventory, device: torch.device, dtype: torch.dtype, dequantize: bool, ranks: int, offload: bool
) -> None:
    """Refuses what cannot fit, before anything is allocated."""
    machine = machine_memory()
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine
    layers: dict[str, int] = {}
    for name, weight in found.weights.items():
        layer = name.rpartition(".")[0] if _is_experts(name) else ""
        layers[layer] = layers.get(layer, 0) + weight.memory(dtype.itemsize, dequantize)
    needed, experts = sum(layers.values()) // ranks, [size for layer, size in layers.items() if layer]
    streamed = streamed_bytes(needed, experts)
    kind = str(dtype).removeprefix("torch.")
    mend = "" if found.quantized and not dequantize else "; `dgemma quantize` makes a copy that needs less"
    if offload and machine is not None and sum(experts) > machine:
        raise CapacityError(
            f"{found.directory}: its experts need {sum(experts) / 1e9:.1f} GB ({kind}) of host memory, this machine "
            f"has {machine / 1e9:.1f}{mend}"
        )
    if offload:
        needed, kind = streamed, f"{kind}, experts of two layers at a time"
    elif device.type == "cuda" and ranks == 1 and not dequantize and room is not None and streamed <= room:
        mend = f'; offload="experts" (--offload experts) needs {streamed / 1e9:.1f} there{mend}'
    if room is not None and needed > room:
        raise CapacityError(
            f"{found.directory}: its weights need {needed / 1e9:.1f} GB ({kind}), {device} has {room / 1e9:.1f}{mend}"
        )


def _away(weight: Weight, buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | Quantized:
    """A weight in host memory, for a device that takes it as it is."""
    host = torch.device("cpu")
    if weight.layout is None:
        return _floating(weight, buffer, host, dtype)
    return _quantized(weight, host, packed=False)


def _part(
    weight: Weight, name: str, ranks: Ranks, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | cpu.Weight:
    """One rank's part of a weight; of experts that are apart on disk only its own are read."""
    if len(weight.pieces) > 1:
        first, end = ranks.experts
        pieces = tuple(
            replace(piece, where=(piece.where[0] - first, *piece.where[1:]))  # type: ignore[operator]
            for piece in weight.pieces
            if first <= piece.where[0] < end  # type: ignore[operator]
        )
        own = replace(weight, shape=(end - first, *weight.shape[1:]), pieces=pieces)
        if weight.layout is None:
            return _floating(own, None, device, dtype)
        held = _quantized(own, device)
    elif weight.layout is None:
        return ranks.cut(name, read_tensor(weight.pieces[0].plain)).to(device=device, dtype=dtype)
    else:
        held = ranks.cut(name, _quantized(weight, torch.device("cpu"))).to(device)
    return cpu.pack(held) if device.type == "cpu" else held


def _floating(weight: Weight, buffer: torch.Tensor | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A floating-point weight, put together if it is stored in pieces."""
    if len(weight.pieces) == 1:
        return read_tensor(weight.pieces[0].plain, buffer).to(device=device, dtype=dtype)
    whole = torch.empty(weight.shape, dtype=dtype, device=device)
    for piece in weight.pieces:
        whole[piece.where] = read_tensor(piece.plain, buffer).to(device=device, dtype=dtype)
    return whole


def _quantized(weight: Weight, device: torch.device, *, packed: bool = True) -> Quantized:
    """A weight in few bits, put together from its experts.

    Args:
        packed: whether it is for the CPU's kernels, if it is on a CPU.
    """
    whole: Quantized | None = None
    for piece in weight.pieces:
        target = None if whole is None else whole[piece.where]
        matrix = read_quantized(piece, target if device.type == "cpu" else None)
        if device.type == "cpu" and packed and not can_pack(matrix):
            spread = matrix.floating or matrix.shape[-1] % CHUNK != 0
            matrix = quantize(matrix.dequantize(), bits=8, group=None if spread else CHUNK, search=False)
        if len(weight.pieces) == 1:
            return matrix.to(device)
        if whole is None or target is None:
            whole = matrix.room(weight.shape[:-1], device)
            target = whole[piece.where]
        for name, tensor in target.tensors.items():
            if tensor.data_ptr() != matrix.tensors[name].data_ptr():
                tensor.copy_(matrix.tensors[name])
    assert whole is not None
    return whole


class _Unfilled(TorchFunctionMode):
    """Leaves initial values out: on the meta device there are none, yet torch imports 800 modules to make them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **kwargs)


def _put(network: nn.Module, name: str, weight: torch.Tensor | cpu.Weight) -> None:
    """Puts a weight in the place of the parameter or buffer of that name."""
    path, _, last = name.rpartition(".")
    owner = network.get_submodule(path)
    if not isinstance(weight, torch.Tensor):
        del owner._parameters[last]
        setattr(owner, last, weight)
        return
    old = owner._parameters.get(last)
    if old is not None:
        owner._parameters[last] = nn.Parameter(weight, requires_grad=old.requires_grad)
    else:
        assert last in owner._buffers
        owner._buffers[last] = weight
