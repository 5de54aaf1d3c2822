"""Weights from disk into a network, one tensor at a time."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import ModelConfig
from ..errors import CheckpointError, ConfigError
from ..model import Network
from .files import FLOATS, Entry, find_weights, read_into, same_content
from .names import Kind, VisionIgnored, classify, disk_name, network_name, tied_source


def load_network(
    directory: Path,
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Network:
    """Builds the network and fills it from the directory's safetensors files, strictly and in bounded memory.

    At most the network and one more tensor (as it is on disk) are in memory at any time. Every check that needs no
    tensor's content is done before the first one is read.

    Args:
        directory: where the weights are; see `files.find_weights`.
        config: sizes; every tensor must be there in exactly the shape that follows from them.
        device: where the tensors go, each as soon as it is read.
        dtype: floating-point type of the loaded tensors; None is what `config.json` says (`config.dtype`).

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or type, differs from the tensor it is
            a copy of, or a norm or scalar is not finite; or a file is damaged. Names the tensor and the file.

    Warns:
        VisionIgnored: once, when the files also hold weights for images.
    """
    dtype = config_dtype(config) if dtype is None else dtype
    entries = find_weights(Path(directory))
    network = empty_network(config)
    expected = network.state_dict()
    own, tied, vision = _sort(entries, expected)
    _check(Path(directory), own, expected)
    for name, entry in tied.items():
        source = entries.get(tied_source(name) or "")
        if source is None or not same_content(entry, source):
            raise CheckpointError(
                f"{entry.path}: {name} differs from {tied_source(name)}; DiffusionGemma has one set of weights"
            )
    device = torch.device(device)
    converted = {
        name: entry.nbytes
        for name, entry in own.items()
        if device.type != "cpu" or FLOATS[entry.dtype] != str(dtype).removeprefix("torch.")
    }
    # One buffer for all tensors that are not used as they are: many that come and go would leave holes in the heap.
    buffer = torch.empty(max(converted.values(), default=0), dtype=torch.uint8, device="cpu")
    # The file's own order: reading runs forward through each shard.
    for name, entry in sorted(own.items(), key=lambda item: (item[1].path.name, item[1].start)):
        tensor = read_tensor(entry, buffer if name in converted else None)
        if tensor.dim() == 1 and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{entry.path}: {entry.name} holds NaN or infinity; the file is damaged")
        _put(network, name, tensor.to(device=device, dtype=dtype))
    if vision:
        count = len(vision)
        warnings.warn(
            f"{directory}: left {count} tensors for images on disk; text works, images do not",
            VisionIgnored,
            stacklevel=2,
        )
    return network


def empty_network(config: ModelConfig) -> Network:
    """The network on the meta device: shapes without memory."""
    with torch.device("meta"), _Unfilled():
        return Network(config)


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
    """One floating-point tensor as it is on disk, in memory of its own or in a buffer of bytes that is large enough.

    Raises:
        CheckpointError: it is of another type, or the file can't be read.
    """
    if entry.dtype not in FLOATS:
        raise CheckpointError(f"{entry.path}: {entry.name} is of type {entry.dtype}; needs one of {', '.join(FLOATS)}")
    dtype = getattr(torch, FLOATS[entry.dtype])
    if buffer is None:
        tensor = torch.empty(entry.shape, dtype=dtype, device="cpu")
    else:
        tensor = buffer[: entry.nbytes].view(dtype).view(entry.shape)
    if entry.nbytes:
        array: Any = tensor.view(-1).view(torch.uint8).numpy()
        read_into(entry, memoryview(array))
    return tensor


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


def _sort(
    entries: dict[str, Entry], expected: dict[str, torch.Tensor]
) -> tuple[dict[str, Entry], dict[str, Entry], dict[str, Entry]]:
    """The network's own tensors by network name, tied copies and vision tensors by disk name."""
    own: dict[str, Entry] = {}
    tied: dict[str, Entry] = {}
    vision: dict[str, Entry] = {}
    for name, entry in entries.items():
        kind = classify(name)
        inner = network_name(name if kind is Kind.OWN else tied_source(name) or "")
        if kind is Kind.VISION:
            vision[name] = entry
        elif inner is None or inner not in expected:
            raise CheckpointError(f"{entry.path}: {name} is unexpected; config.json describes no such tensor")
        elif kind is Kind.OWN:
            own[inner] = entry
        else:
            tied[name] = entry
    return own, tied, vision


def _check(directory: Path, own: dict[str, Entry], expected: dict[str, torch.Tensor]) -> None:
    """Refuses missing tensors, wrong shapes and types that are no floating point."""
    missing = [name for name in expected if name not in own]
    if missing:
        files = sorted({entry.path.name for entry in own.values()})
        where = f"{directory / files[0]}" if len(files) == 1 else f"{directory} ({len(files)} shards)"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{where}: {disk_name(missing[0])} is missing{more}")
    for name, entry in own.items():
        shape = tuple(expected[name].shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: {entry.name} has shape {list(entry.shape)}; config.json says {list(shape)}"
            )
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{entry.path}: {entry.name} is of type {entry.dtype}; needs one of {', '.join(FLOATS)}"
            )
        assert entry.numel == math.prod(shape)


def _put(network: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a real tensor in the place of the parameter or buffer of that name."""
    path, _, last = name.rpartition(".")
    owner = network.get_submodule(path)
    old = owner._parameters.get(last)
    if old is not None:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        assert last in owner._buffers
        owner._buffers[last] = tensor
