"""How much memory there is, how much this process has used at most, and who gets what where experts are offloaded."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

BUFFERS = 2  # on a device, that layers' experts are streamed through in turns


def in_words(count: int) -> str:
    """Bytes for people: "13.8 GB", and "2.3 MB" where that would be "0.0 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of the container if that is less; None where it cannot be told."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def streamed_bytes(weights: int, experts: Sequence[int]) -> int:
    """What a device holds of a network while all experts are in host memory.

    Args:
        weights: bytes of all weights.
        experts: those of each layer's experts, which are among them.
    """
    return weights - sum(experts) + sum(sorted(experts)[-1:]) * min(BUFFERS, len(experts))


def resident_layers(experts: Sequence[int], room: int) -> int:
    """How many of the first layers' experts a device keeps, with room for the buffers of those that it does not.

    Args:
        experts: bytes of each layer's experts.
        room: bytes for experts and buffers together.
    """
    if sum(experts) <= room:
        return len(experts)
    left, count = room - BUFFERS * max(experts), 0
    while experts[count] <= left:
        left -= experts[count]
        count += 1
    return count


def _windows_memory() -> int | None:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "page", "page_free", "virtual", "virtual_free")),
            ("extended", ctypes.c_ulonglong),
        )

    status = Status()
    status.length = ctypes.sizeof(Status)
    library = getattr(ctypes, "windll", None)
    if library is None or not library.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total)
