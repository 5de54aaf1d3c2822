"""One run of the GPU check: what was asked, the time that is left, and where its figures go."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from functools import cached_property
from typing import Any

import torch
from gpu_case import timed
from gpu_weights import network_of
from record import Results

from dgemma.config import ModelConfig
from dgemma.model import Network

LAYERS = 30


class Check:
    """One run: options, time left, records."""

    def __init__(self, options: argparse.Namespace):
        self.tiny, self.forms = options.tiny, options.forms
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.end = time.monotonic() + options.seconds
        config = {name: value for name, value in vars(options).items() if name not in ("out", "folder")}
        name = "gpu-check" + ("-tiny" if self.tiny else "")
        self.results = Results(name, config, options.out, options.folder)
        self.figures: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.layers = 2 if self.tiny else LAYERS
        self.batches, self.prefixes = ((2,), (8, 24)) if self.tiny else (options.batches, options.prefixes)

    def say(self, text: str, **record: Any) -> None:
        """A record, and a line for who watches."""
        self.results.add(**record)
        sys.stderr.write(text + "\n")

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether there is time; what there is none for is named in the end."""
        if self.end - time.monotonic() > seconds or self.tiny:
            return True
        self.left_out.append(what)
        return False

    def network(self, config: ModelConfig, form: str) -> Network | None:
        """A random network; where the card does not hold it, none, and it is named."""
        self.free()
        try:
            return network_of(config, form, self.device)
        except torch.OutOfMemoryError:
            self.left_out.append(f"{form}: the weights do not fit")
        self.free()
        return None

    def free(self) -> None:
        """Gives memory back before the next network."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GB that the allocator had given out at most since `free`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second: of a copy, read and written, or of a sum, which only reads; the better."""
        source = torch.empty(1 << (20 if self.tiny else 31), dtype=torch.uint8, device=self.device)
        target, numbers = torch.empty_like(source), source.zero_().view(torch.float32)
        copied = 2 * source.nbytes / timed(lambda: target.copy_(source), self.device)
        read = source.nbytes / timed(lambda: numbers.sum(), self.device)
        self.say(
            f"memory: {copied / 1e9:.0f} GB/s copied, {read / 1e9:.0f} GB/s read",
            section="bandwidth", copied=copied, read=read,
        )  # fmt: skip
        return max(copied, read)
