"""Weights in few bits: how they are held, found and stored. torch is loaded on first use only."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .policy import FORMATS, KINDS, Policy, kind_of

if TYPE_CHECKING:
    from .measure import ErrorSum
    from .quantized import Quantized
    from .search import quantize, to_fp8

__all__ = ["FORMATS", "KINDS", "ErrorSum", "Policy", "Quantized", "kind_of", "quantize", "to_fp8"]

_HOMES = {"ErrorSum": "measure", "Quantized": "quantized", "quantize": "search", "to_fp8": "search"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
