"""Random numbers of the card are those of the processor, to the bit."""

from __future__ import annotations

import torch
from gpu_tensors import DEVICE

from dgemma.diffusion import CounterDraws
from dgemma.kernels.triton.draws import draws


def test_equal_to_the_counters() -> None:
    """Seeds of any size, odd lengths, late canvases and steps, vocabularies that are no power of two."""
    seeds = [0, 7, 2**63 + 12345, 2**64 - 1, -1, 2**32]
    canvases, steps = [0, 3, 1, 2**31, 0, 70000], [1, 48, 0, 7, 2, 5]
    for length, vocabulary in ((1, 60), (13, 262_144), (256, 262_143)):
        shape = len(seeds), length
        own = [
            torch.tensor(v, device=DEVICE)
            for v in ([s % 2**64 - (s % 2**64 >> 63 << 64) for s in seeds], canvases, steps)
        ]
        uniforms, noise = draws(
            *own, torch.empty(shape, device=DEVICE), torch.empty(shape, dtype=torch.int64, device=DEVICE), vocabulary
        )
        for row, (seed, canvas, step) in enumerate(zip(seeds, canvases, steps, strict=True)):
            host = CounterDraws([seed])
            assert torch.equal(noise[row].cpu(), host.renoise(canvas, step, 1, length, vocabulary)[0])
            wanted = host.uniform(canvas, step, CounterDraws.SAMPLE, length)[0].float()
            assert torch.equal(uniforms[row].cpu(), wanted)
