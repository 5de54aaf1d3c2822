"""The compiled library: finding it, choosing its instruction set, calling it with plain buffers.

It is built by `pip install` where there is a compiler and lies next to this file; it is never built at import. The
environment variable `DGEMMA_CPU_ISA` forces an instruction set (`avx512vnni`, `avxvnni`, `avx2`, `neon`, `portable`),
or with `reference` the twins in plain torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError

VARIABLE = "DGEMMA_CPU_ISA"
REFERENCE = "reference"
LIBRARY = "dgemma_cpu.dll" if sys.platform == "win32" else "libdgemma_cpu.so"
ABI = 3


class SlowKernels(UserWarning):
    """The compiled kernels are missing; the same is done in plain torch, several times slower."""


class Matrix(ctypes.Structure):
    """`DgemmaMatrix`."""

    _fields_ = (
        ("bits", c_int32),
        ("count", c_int32),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("group", c_int64),
        ("data", c_void_p),
        ("scales", c_void_p),
        ("factors", c_void_p),
    )


class CWish(ctypes.Structure):
    """`DgemmaWish`."""

    _fields_ = (
        ("cap", c_float),
        ("heat", c_float),
        ("biases", c_int64),
        ("words", c_void_p),
        ("bias", c_void_p),
        ("ends", c_int64),
        ("end", c_void_p),
        ("barred", c_int64),
    )


class CBeliefs(ctypes.Structure):
    """`DgemmaBeliefs`."""

    _fields_ = (("argmax", c_void_p), ("sampled", c_void_p), ("entropies", c_void_p), ("totals", c_void_p))


_FUNCTIONS = {
    "dgemma_abi": (c_int32, ()),
    "dgemma_compiled": (c_char_p, ()),
    "dgemma_runs": (c_int32, (c_char_p,)),
    "dgemma_use": (c_int32, (c_char_p,)),
    "dgemma_team": (None, (c_void_p,)),
    "dgemma_pack": (None, (c_void_p,) * 5 + (c_int32,)),
    "dgemma_linear": (None, (c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int32)),
    "dgemma_experts": (None, (c_void_p, c_int32, c_int64, c_int64) + (c_void_p,) * 6 + (c_int32,)),
    "dgemma_norm": (None, (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_float, c_void_p, c_int32)),
    "dgemma_gate": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32)),
    "dgemma_read": (None, (c_void_p, c_int64, c_int64) + (c_void_p,) * 3 + (c_int32,)),
    "dgemma_vocabulary_room": (c_int64, (c_int64, c_void_p, c_int32)),
    "dgemma_vocabulary": (
        None,
        (c_void_p, c_int32, c_int64) + (c_void_p,) * 4 + (c_float,) + (c_void_p,) * 4 + (c_int32,),
    ),
}


def load(path: Path) -> ctypes.CDLL:
    """Opens a library and declares its functions.

    Raises:
        OSError: it cannot be opened, or is of another version.
    """
    library = ctypes.CDLL(str(path))
    try:
        if library.dgemma_abi() != ABI:
            raise OSError(f"{path.name} is of another version")
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise OSError(f"{path.name} lacks a function") from error
    library.dgemma_team(_openmp())
    return library


def _openmp() -> int | None:
    """The address of the OpenMP runtime's entry that torch loaded, so that both work on the same threads."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library with its instruction set chosen; None: the twins do its work, which a warning says once.

    Raises:
        ConfigError: `DGEMMA_CPU_ISA` names what was not compiled, or what this machine cannot run.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == REFERENCE:
        return None
    try:
        found = load(Path(__file__).with_name(LIBRARY))
    except OSError as error:
        if wanted:
            raise ConfigError(f"{VARIABLE}: {wanted} needs the compiled kernels ({error})") from error
        warnings.warn(
            "the compiled CPU kernels are missing, so plain torch does their work, slower, and several times so with "
            "weights in few bits; with a C++ compiler, `pip install --force-reinstall --no-deps` of dgemma builds them",
            SlowKernels,
            stacklevel=3,
        )
        return None
    if wanted and not found.dgemma_use(wanted.encode()):
        can = [REFERENCE, *running(found)]
        raise ConfigError(f"{VARIABLE}: {wanted!r} cannot run here; what can: {', '.join(can)}")
    return found


def running(found: ctypes.CDLL) -> list[str]:
    """Instruction sets that were compiled and that this machine can run, the fastest first."""
    names = found.dgemma_compiled().decode().split()
    return [name for name in names if found.dgemma_runs(name.encode())]


def isa() -> str:
    """The instruction set in use; "reference": plain torch."""
    found = library()
    if found is None:
        return REFERENCE
    return os.environ.get(VARIABLE) or running(found)[0]


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor's numbers are; None for none."""
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return tensor.data_ptr()


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
