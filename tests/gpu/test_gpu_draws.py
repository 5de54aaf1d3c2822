"""Random numbers of the card are those of the processor, to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from gpu_tensors import DEVICE

from dgemma.diffusion import CounterDraws
from dgemma.kernels.belief import Belief
from dgemma.kernels.triton.draws import units
from dgemma.kernels.triton.settle import choose, roll

SEEDS = [0, 7, 2**63 + 12345, 2**64 - 1, -1, 2**32]
SIGNED = [seed % 2**64 - (seed % 2**64 >> 63 << 64) for seed in SEEDS]


@triton.jit
def _uniform_kernel(seeds, canvases, steps, out, length, PURPOSE: tl.constexpr, WIDTH: tl.constexpr):
    row, spots = tl.program_id(0), tl.arange(0, WIDTH)
    upper = tl.load(steps + row).to(tl.uint64) | (tl.load(canvases + row).to(tl.uint64) << 32)
    value = units(spots, upper, PURPOSE, tl.load(seeds + row).to(tl.uint64, bitcast=True))
    tl.store(out + row * length + spots, value, mask=spots < length)


def test_equal_to_the_counters() -> None:
    """Seeds of any size, odd lengths, late canvases and steps."""
    canvases, steps = [0, 3, 1, 2**31, 0, 70000], [1, 48, 0, 7, 2, 5]
    own = [torch.tensor(values, device=DEVICE) for values in (SIGNED, canvases, steps)]
    for length in (1, 13, 256):
        for purpose in (CounterDraws.NOISE, CounterDraws.SAMPLE):
            found = torch.empty(len(SEEDS), length, dtype=torch.float64, device=DEVICE)
            _uniform_kernel[(len(SEEDS),)](*own, found, length, PURPOSE=purpose, WIDTH=256)
            for row, (seed, canvas, step) in enumerate(zip(SEEDS, canvases, steps, strict=True)):
                wanted = CounterDraws([seed]).uniform(canvas, step, purpose, length)[0]
                assert torch.equal(found[row].cpu(), wanted)


def test_single_tokens() -> None:
    """Each token's number by its own seed and place; what is taken of what was found."""
    numbers, greedy = [0, 3, 1, 2**31, 0, 70000], [0, 1, 0, 0, 1, 0]
    asked = torch.tensor([SIGNED, numbers, greedy], device=DEVICE)
    found = roll(asked).tolist()
    for number, seed, own in zip(numbers, SEEDS, found, strict=True):
        assert own == CounterDraws([seed]).uniform(number, 0, CounterDraws.SAMPLE, 1).float().item()
    argmax, sampled = (torch.arange(6, device=DEVICE) + first for first in (10, 20))
    entropies = torch.tensor([0.5, 0.0, float("nan"), 2.0, float("inf"), 1.0], device=DEVICE)
    tokens = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    choose(asked, Belief(argmax, sampled, entropies), tokens)
    assert tokens.tolist() == [20, 11, -1, 23, -1, 25]
