"""What the checks on a card have in common: an operation beside its twin, its time, random tensors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_weights import random_quantized
from torch import Tensor

from dgemma.quant import Quantized, quantize

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}  # of the largest number, where both sum in float32
FP8_TOLERANCE = 2**-4  # a middle that is rounded on the other side of a step of FP8


@dataclass(kw_only=True)
class Case:
    """One operation at one size.

    Fields:
        ours, twin: give the same tensors; the twin in plain torch.
        library: what a library has for it, for the time alone; None where it has nothing.
        moved: bytes that must be read.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    twin: Callable[[], tuple[Tensor, ...]]
    library: Callable[[], Any] | None = None
    moved: int = 0
    tolerance: float


def timed(run: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Seconds, the median; on a card with cold caches and by its own clock, as a graph where it can be one: what the
    host takes to launch is not in it."""
    run()
    seconds = []
    if device.type != "cuda":
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)
    run = recorded(run)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(repeats + 1):
        flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        seconds.append(before.elapsed_time(after) / 1e3)
    return statistics.median(seconds[1:])


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """A replay of what it does on the card; itself where it waits for the card."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return lambda: (graph.replay(), kept)


def gap(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest difference, as a share of the largest number."""
    worst = 0.0
    for own, right in zip(found, wanted, strict=True):
        difference = (own.float() - right.float()).abs().max()
        worst = max(worst, float(difference / right.float().abs().max().clamp_min(1e-6)))
    return worst


class Maker:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def numbers(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal ones."""
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def weight(self, form: str, *shape: int) -> Tensor | Quantized:
        """A weight of about 1 / sqrt(inputs)."""
        if form == "nvfp4":
            return random_quantized(form, None, shape, self.generator)
        values = self.numbers(*shape, scale=shape[-1] ** -0.5)
        if form == "bfloat16":
            return values
        if form == "fp8":
            scales = values.float().abs().amax(dim=-1, keepdim=True) / 448.0
            return Quantized(bits=8, group=None, data=(values.float() / scales).to(torch.float8_e4m3fn), scales=scales)
        group = None if form == "int8" else 64 if shape[-1] % 64 == 0 else 32
        return quantize(values.float(), bits=int(form[3:]), group=group, search=False)
