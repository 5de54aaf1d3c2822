"""What networks run on, by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .errors import ConfigError

MOST_RANKS = 8


def device_of(name: str) -> torch.device:
    """The device of a name: cpu, cuda, cuda:1, ..., or auto for a GPU if there is one.

    Raises:
        ConfigError: there is none of that name, or it is of a kind that nothing here runs on.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is unknown (auto, cpu, cuda, cuda:1, ...)") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported (auto, cpu, cuda, cuda:1, ...)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the one that kernels are launched on, for a while; on other devices nothing."""
    own: AbstractContextManager[None] = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    return own


def devices_of(name: str, ranks: int) -> list[str]:
    """One device a rank of a network in parts: the first so many GPUs, or the CPU for all.

    Raises:
        ConfigError: there are not so many, or so many ranks make no sense.
    """
    if not 2 <= ranks <= MOST_RANKS:
        raise ConfigError(f"tensor_parallel: {ranks} is not a number from 1 to {MOST_RANKS}")
    device = device_of(name)
    if device.type == "cpu":
        return ["cpu"] * ranks
    if device.index is not None:
        raise ConfigError(f"device: {name!r} is one GPU; tensor_parallel {ranks} takes the first {ranks}, so say cuda")
    if ranks > torch.cuda.device_count():
        raise ConfigError(f"tensor_parallel: {ranks} ranks need as many GPUs; torch sees {torch.cuda.device_count()}")
    return [f"cuda:{rank}" for rank in range(ranks)]


def check_offload(offload: str | None, device: torch.device, ranks: int) -> None:
    """Refuses an offload that makes no sense.

    Args:
        offload: what stays in host memory; None: nothing.
        ranks: of the network.

    Raises:
        ConfigError: it is of something else than experts, from a CPU, or of a network in parts.
    """
    if offload is None:
        return
    if offload != "experts":
        raise ConfigError(f"offload: {offload!r} is not 'experts'")
    if ranks > 1:
        raise ConfigError("offload: a network in parts has all of its experts on its GPUs; drop one of the two")
    if device.type != "cuda":
        raise ConfigError("offload: on a CPU all weights are in host memory; drop it, or choose a GPU as the device")


def check_keep_packed(keep: bool, device: torch.device, ranks: int) -> None:
    """Refuses to keep a packed copy where none is used.

    Args:
        keep: whether one is asked for.
        ranks: of the network.

    Raises:
        ConfigError: the network is on a GPU or in parts.
    """
    if keep and (device.type != "cpu" or ranks > 1):
        raise ConfigError("keep_packed: is for one whole network on a CPU; drop it, or choose cpu as the device")
