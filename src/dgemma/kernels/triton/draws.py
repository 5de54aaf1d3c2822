"""The sampler's random numbers where the canvas is: `diffusion.CounterDraws` to the bit (Philox4x64-10, Salmon et al.
2011, doi:10.1145/2063384.2063405), so that a request's tokens do not depend on what draws them.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE, TWO = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)  # the rounds' multipliers
STEP, LEAP = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)  # what is added to the key
ROUNDS = tl.constexpr(10)
NOISE, SAMPLE = tl.constexpr(0), tl.constexpr(1)  # what a number is for


@triton.jit
def units(spots, upper, purpose: tl.constexpr, seed):
    """float64 in [0, 1) for positions of a canvas: each block of four has one counter, the first is 1.

    Args:
        upper: `canvas << 32 | step`, uint64.
        seed: its 64 bits, uint64.
    """
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
