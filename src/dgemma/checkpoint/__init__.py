"""Model directories: found or downloaded, read strictly, written whole. torch is loaded on first use only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .names import VisionIgnored

if TYPE_CHECKING:
    from .hub import resolve
    from .load import config_dtype, load_network
    from .save import save_checkpoint
    from .scheme import read_scheme
    from .summary import Summary, summarize

__all__ = [
    "Summary",
    "VisionIgnored",
    "config_dtype",
    "load_network",
    "read_scheme",
    "resolve",
    "save_checkpoint",
    "summarize",
]

_HOMES = {
    "Summary": "summary",
    "config_dtype": "load",
    "load_network": "load",
    "read_scheme": "scheme",
    "resolve": "hub",
    "save_checkpoint": "save",
    "summarize": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
