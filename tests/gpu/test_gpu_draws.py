"""Random numbers of the card are those of the processor, to the bit."""

from __future__ import annotations

import torch
from gpu_tensors import DEVICE

from dgemma.diffusion import CounterDraws
from dgemma.kernels.triton.draws import uniform


def test_equal_to_the_counters() -> None:
    """Seeds of any size, odd lengths, late canvases and steps."""
    seeds = [0, 7, 2**63 + 12345, 2**64 - 1, -1, 2**32]
    canvases, steps = [0, 3, 1, 2**31, 0, 70000], [1, 48, 0, 7, 2, 5]
    own = [
        torch.tensor(v, device=DEVICE) for v in ([s % 2**64 - (s % 2**64 >> 63 << 64) for s in seeds], canvases, steps)
    ]
    for length in (1, 13, 256):
        for purpose in (CounterDraws.NOISE, CounterDraws.SAMPLE):
            found = uniform(*own, purpose, length)
            for row, (seed, canvas, step) in enumerate(zip(seeds, canvases, steps, strict=True)):
                wanted = CounterDraws([seed]).uniform(canvas, step, purpose, length)[0]
                assert torch.equal(found[row].cpu(), wanted)
