"""Who gets how much of the memory: the cache's pages, and experts that a GPU has room for."""

from __future__ import annotations

import logging

import torch

from ..errors import CapacityError
from ..memory import machine_memory
from ..model import Network
from .pages import Pages
from .settings import MEMORY_SHARE, EngineSettings

log = logging.getLogger(__name__)


def plan_cache(network: Network, settings: EngineSettings, limit: int, room: tuple[int, int] | None) -> Pages:
    """As many pages as `room` says; else for `max_batch` requests of full length, or for as many as a share of the free
    memory holds; at least for one, on a GPU for as much of it as there is room for.

    Raises:
        CapacityError: `cache_tokens` is less than one request may need, or a GPU has no room for a short one.
    """
    config, size = network.config, settings.page_size
    if room is not None:
        return Pages(size=size, window=config.sliding_window, full=room[0], sliding=room[1])
    width = [2 * shape.kv_heads * shape.head_dim * network.dtype.itemsize * size for shape in config.layers]
    per_full = sum(w for w, shape in zip(width, config.layers, strict=True) if not shape.sliding)
    per_sliding = sum(w for w, shape in zip(width, config.layers, strict=True) if shape.sliding)
    pages = Pages(size=size, window=config.sliding_window, full=0, sliding=0)
    chunk = max(settings.step_tokens, config.canvas_length)
    # Twice what is in use, so that what the window has left behind stays findable for a while.
    full, used = -(-limit // size), min(-(-limit // size), pages.sliding_needed(chunk))
    sliding = 2 * used
    if settings.cache_tokens is not None:
        if settings.cache_tokens < size:
            raise CapacityError(f"cache_tokens: {settings.cache_tokens} is less than one page of {size}")
        rows = settings.max_batch
        full = settings.cache_tokens // size
        return Pages(size=size, window=config.sliding_window, full=full, sliding=min(full, rows * sliding))
    each = full * per_full + sliding * per_sliding
    if network.device.type != "cuda":
        rows = max(1, min(settings.max_batch, int(MEMORY_SHARE * (machine_memory() or 0)) // each))
        return Pages(size=size, window=config.sliding_window, full=rows * full, sliding=rows * sliding)
    memory = spare_memory(network, settings)
    least = min(full, -(-(chunk + config.canvas_length) // size)) * per_full + used * per_sliding
    if memory < least:
        raise CapacityError(
            f"{network.device}: {memory / 1e9:.1f} GB are left for the cache, and a short request needs "
            f"{least / 1e9:.1f}; a smaller max_batch (--max-batch) leaves more"
        )
    if network.expert_stream is not None:  # the other half is for experts
        memory = max(least, memory // 2)
    rows = min(settings.max_batch, memory // each)
    if rows:
        return Pages(size=size, window=config.sliding_window, full=rows * full, sliding=rows * sliding)
    fewer = min(full, (memory - used * per_sliding) // max(1, per_full))
    log.info("%s: the cache has room for %d tokens of a sequence's %d", network.device, fewer * size, limit)
    return Pages(size=size, window=config.sliding_window, full=fewer, sliding=used)


def keep_experts(network: Network, settings: EngineSettings) -> None:
    """Moves to a GPU the offloaded experts of as many layers as have room there, once all else is there."""
    stream = network.expert_stream
    if stream is not None and network.device.type == "cuda":
        stream.keep(spare_memory(network, settings))
        count = len(network.layers)
        log.info("%s: the experts of %d of %d layers are streamed", network.device, stream.streamed, count)


def spare_memory(network: Network, settings: EngineSettings) -> int:
    """Bytes of a GPU that are free and stay so in a step."""
    config = network.config
    scores = settings.max_batch * config.canvas_length * config.vocab_size * network.dtype.itemsize
    return max(0, int(0.9 * torch.cuda.mem_get_info(network.device)[0]) - scores)
