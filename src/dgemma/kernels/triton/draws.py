"""The sampler's random numbers where the canvas is: `diffusion.CounterDraws` to the bit (Philox4x64-10, Salmon et al.
2011, doi:10.1145/2063384.2063405), so that a request's tokens do not depend on what draws them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import power

ONE, TWO = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)  # the rounds' multipliers
STEP, LEAP = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)  # what is added to the key
ROUNDS = tl.constexpr(10)


@triton.jit
def _units(spots, upper, purpose: tl.constexpr, seed):
    """Numbers in [0, 1) for places of a canvas: each block of four has one counter, the first is 1."""
    a = (spots // 4 + 1).to(tl.uint64)
    b = tl.zeros_like(a)
    c = b + upper
    d = b + purpose
    first, second = seed, tl.zeros_like(seed)
    one, two = b + ONE, b + TWO
    for _ in tl.static_range(ROUNDS):
        high, low = tl.umulhi(a, one), a * one
        top, bottom = tl.umulhi(c, two), c * two
        a, b, c, d = top ^ b ^ first, bottom, high ^ d ^ second, low
        first, second = first + STEP, second + LEAP
    pick = spots % 4
    word = tl.where(pick == 0, a, tl.where(pick == 1, b, tl.where(pick == 2, c, d)))
    return (word >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _draws_kernel(seeds, canvases, steps, uniforms, noise, words, length, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    spots = tl.arange(0, WIDTH)
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    upper = tl.load(steps + row).to(tl.uint64) | (tl.load(canvases + row).to(tl.uint64) << 32)
    there, inside = row * length + spots, spots < length
    tl.store(noise + there, (_units(spots, upper, 0, seed) * words).to(tl.int64), mask=inside)
    tl.store(uniforms + there, _units(spots, upper, 1, seed).to(tl.float32), mask=inside)


def draws(
    seeds: Tensor, canvases: Tensor, steps: Tensor, uniforms: Tensor, noise: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Fills `uniforms` float32 [B, L] (to sample with) and `noise` int64 [B, L] (uniform tokens), and returns them.

    Args:
        seeds: int64 [B], a seed's 64 bits.
        canvases, steps: int64 [B].
    """
    rows, length = noise.shape
    if rows:
        _draws_kernel[(rows,)](
            seeds, canvases, steps, uniforms, noise, vocabulary, length, WIDTH=power(length), num_warps=4
        )
    return uniforms, noise
