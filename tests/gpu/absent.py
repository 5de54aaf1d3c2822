"""A card that is not there: what steps launch at the 26B's sizes, compiled for it as Triton would, and not run.

    python absent.py ARCHITECTURE FORM [STEP ...]

The engine runs on torch's "meta" device, whose tensors have shapes and no numbers, and Triton is told of a card: a
compute capability ("89") or an AMD architecture ("gfx942"). FORM is that of the weights; "float32" is the demo model.
STEP is "one" (a canvas), "commit" (one committed beside the next), "eight" (canvases of likely words), or "token". A
kernel that needs more shared memory than the card has, or keeps more numbers outside of registers than `SPILLED`, or
multiplies without tensor cores, is named, and the exit status is 1. The last line is how many were compiled.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KIB = 1024
SHARED = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99, "gfx950": 160}  # KiB; others: 64
SPILLED = 512  # bytes a thread; more than that is no accident. Not of RDNA, which holds what it multiplies twice
TENSOR_CORES = re.compile(r"wgmma|mma\.sync|tcgen05\.mma|v_mfma|v_wmma")
MULTIPLIES = ("_linear_kernel", "_gate_up_kernel", "_down_kernel", "_attend_kernel", "_scores_kernel", "_blend_kernel")
STEPS = {"one": (1, False), "commit": (1, True), "eight": (8, False), "token": (0, True)}  # canvases, whether encoded
PREFIX = 1024


class Driver:
    """What Triton asks of a card's driver to compile for it."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_active_torch_device = lambda: torch.device("meta")


class Pointer:
    """A tensor as Triton looks at it: its kind of number, and how its first one is aligned."""

    def __init__(self, tensor: Tensor):
        assert tensor.is_meta, "a tensor of the host's was handed to a kernel"
        self.dtype, self._place = tensor.dtype, tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:
        return self._place


class Compiled:
    """Kernels that were compiled, and what is wrong with some."""

    def __init__(self, architecture: str, exact: bool):
        self.wave = 64 if architecture.startswith("gfx9") else 32
        self.target = GPUTarget(
            *(("cuda", int(architecture)) if architecture.isdigit() else ("hip", architecture)), self.wave
        )
        self.shared, self.exact = SHARED.get(architecture, 64) * KIB, exact
        self.seen: set[str] = set()
        self.wrong: list[str] = []

    def take_over(self) -> None:
        """From here on launches are compilations."""
        driver.set_active(Driver(self.target))
        run = JITFunction.run

        def compile(kernel: Any, *given: Any, grid: Any, warmup: bool, **sizes: Any) -> Any:
            own = [Pointer(one) if isinstance(one, Tensor) else one for one in given]
            made = run(kernel, *own, grid=grid, warmup=True, **sizes)
            if made.hash not in self.seen:
                self.seen.add(made.hash)
                self.look(kernel.__name__, made, sizes)
            return made

        JITFunction.run = compile

    def look(self, name: str, made: Any, sizes: dict[str, Any]) -> None:
        """Whether it fits, stays in registers and multiplies with tensor cores."""
        code = made.asm.get("ptx") or made.asm["amdgcn"]
        spilled = self.spilled(made)
        reasons = [
            f"{made.metadata.shared // KIB} KiB of shared memory" * (made.metadata.shared > self.shared),
            f"{spilled} bytes spilled" * (spilled > SPILLED and not str(self.target.arch).startswith("gfx1")),
            "no tensor cores" * (name in MULTIPLIES and not self.exact and not TENSOR_CORES.search(code)),
        ]
        if any(reasons):
            self.wrong.append(f"{name} {sizes}: {', '.join(filter(None, reasons))}")

    def spilled(self, made: Any) -> int:
        """Bytes a thread that are kept outside of registers."""
        if "cubin" not in made.asm:
            return 4 * int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", made.asm["amdgcn"])[0])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return int(re.findall(r"STACK:(\d+)", told)[0])


def pretend(architecture: str, shared: int) -> None:
    """Tells torch's users of the card."""
    nvidia = architecture.isdigit()
    major, minor = divmod(int(architecture), 10) if nvidia else (9, 4)
    known = {"multi_processor_count": 128, "major": major, "minor": minor, "shared_memory_per_block": shared}
    if nvidia:
        known |= {"shared_memory_per_block": 48 * KIB, "shared_memory_per_block_optin": shared}
    else:
        torch.version.hip = "6.4"
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (major, minor)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(**known)


def network_of(config: Any, form: str) -> Any:
    """A network without numbers, its weights in a form."""
    from gpu_weights import held_in

    from dgemma.checkpoint.load import empty_network
    from dgemma.model import Network
    from dgemma.quant import Quantized

    Network.embedding_scale = lambda self: torch.tensor(self.config.hidden_size**0.5)  # type: ignore[method-assign]
    network = empty_network(config).to(torch.float32 if form == "float32" else torch.bfloat16)
    for name, (own, group) in held_in(network, form).items():
        path, _, last = name.rpartition(".")
        owner = network.get_submodule(path)
        *rows, width = owner._parameters.pop(last).shape
        few = own in ("int4", "nvfp4")
        kind = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(own, torch.uint8)
        scales = torch.empty(*rows, width // (group or width), device="meta")
        weight = Quantized(
            bits=4 if few else 8,
            group=group,
            data=torch.empty(*rows, width // (2 if few else 1), dtype=kind, device="meta"),
            scales=scales.to(torch.float8_e4m3fn) if own == "nvfp4" else scales,
            factors=torch.empty(*rows, 1, device="meta") if own == "nvfp4" else None,
        )
        setattr(owner, last, weight)
    return network


def without_numbers(value: Any) -> Any:
    """A step's inputs on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {key: without_numbers(own) for key, own in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: without_numbers(getattr(value, f.name)) for f in fields(value)})
    return value


def step(network: Any, canvases: int, encoded: bool) -> None:
    """What a step launches, each canvas behind a prefix."""
    from gpu_rows import ask, config_rows, ticket

    from dgemma.engine.card import CardForward
    from dgemma.engine.forward import Work
    from dgemma.engine.inputs import Seated
    from dgemma.engine.row import Row

    config, count = network.config, max(1, canvases)
    length = config.canvas_length
    pages, places = config_rows(config, count, PREFIX + 2 * length)
    forward = CardForward(network, pages, canvases=places, limit=PREFIX + 2 * length)
    works, seated = [], []
    fresh = (length if canvases else 1) if encoded else 0
    for number in range(count):
        request = ask(
            config, [1] * (PREFIX + fresh), seed=number, new=length, steps=9, top_p=0.9 if count == 8 else 1.0
        )
        row = Row(request, ticket(PREFIX, number), None, config.vocab_size)
        row.enter(pages, reuse=False)
        assert row.table is not None
        row.table.reserve(PREFIX)
        row.table.advance(row.history, PREFIX)
        row.table.reserve(fresh)
        work = Work(row=row, encode=fresh, denoise=canvases > 0)
        works.append(work)
        if canvases:
            canvas = row.look()
            work.denoised = length
            seated.append(Seated(work, canvas, number))
    planned = forward.planner.plan(
        works if encoded else [], seated, len(seated), draws=[not canvases] * len(works) if encoded else []
    )
    with torch.no_grad():
        forward._step(without_numbers(planned.inputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", help="90, 89, gfx942, ...")
    parser.add_argument("form", choices=["float32", "bfloat16", "fp8", "int8", "int4", "nvfp4"])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; all, if none is named")
    asked = parser.parse_args()
    architecture, form, steps = asked.architecture, asked.form, asked.steps or list(STEPS)
    for name in steps:
        if name not in STEPS:
            parser.error(f"{name}: no such step ({', '.join(STEPS)})")
    compiled = Compiled(architecture, exact=form == "float32")
    compiled.take_over()
    pretend(architecture, compiled.shared)
    from gpu_weights import config_of

    from dgemma.config import ModelConfig
    from dgemma.kernels import gpu

    demo = Path(__file__).parents[2] / "src/dgemma/demo/config.json"
    config = ModelConfig.read(demo) if form == "float32" else config_of(2, tiny=False)
    network = network_of(config, form)
    missing = gpu.missing(network)
    assert missing is None, missing
    for name in steps:
        step(network, *STEPS[name])
    sys.stdout.write("\n".join([*compiled.wrong, f"{len(compiled.seen)} kernels"]) + "\n")
    return 1 if compiled.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
