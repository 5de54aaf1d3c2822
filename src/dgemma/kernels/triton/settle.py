"""A step's sampling around the vocabulary step, for many canvases that stay on the card, in three launches.

1. `ask`: each canvas's temperature and the random numbers it samples with.
2. `settle`: what `diffusion.Canvas` does of what was found: acceptance, fresh noise, pins, stability, the stop.
3. `keep`: the blend's parts added up, scaled and kept as soft embeddings.

And for single tokens, of requests in autoregressive mode, in two: `roll`, their random numbers; `choose`, their words.

Entropies are added up in float64. So the order in which that is done does not show, and what is accepted is what the
reference accepts, down to its rounding of each sum to float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..belief import Belief
from .common import narrow, power
from .draws import NOISE, SAMPLE, units

ENDS = 16  # end tokens that a place has room for
GOES_ON, OVER, BROKEN = 0, 1, 2  # what `settle` says of a canvas
SEED, INDEX, LENGTH, STEPS, STABLE, PARTIAL, GREEDY, FIRST_END = (tl.constexpr(column) for column in range(8))
LEVELS = tl.constexpr(5)
START, SPAN, HEAT, BOUND, CONFIDENCE = (tl.constexpr(column) for column in range(5))


class Held(NamedTuple):
    """What places hold of their canvases: P places of up to L positions.

    Fields:
        whole: int64 [P, 7 + ENDS]: seed, number of the canvas in its answer, length, steps at most, stability
            threshold, whether only the part through the first end token must be stable, whether the likeliest word is
            taken; then end tokens, filled up with -1.
        real: float32 [P, LEVELS + 3]: lowest temperature, what the highest has more, the request's own, entropy bound,
            confidence threshold; and what words are restricted to (`likely.keep_likely`).
        counts: int64 [P, 2]: steps done, and for how many of them the likeliest tokens have stayed as they were.
        pins: int64 [P, L], tokens that positions keep; -1: none.
        tokens: int64 [P, L], what the network looks at next; positions behind a shorter canvas's end mean nothing.
        argmax: int64 [P, L], the likeliest ones; -1 before the first step.
        accepted: bool [P, L].
        entropies: float32 [P, L].
    """

    whole: Tensor
    real: Tensor
    counts: Tensor
    pins: Tensor
    tokens: Tensor
    argmax: Tensor
    accepted: Tensor
    entropies: Tensor

    @classmethod
    def empty(cls, places: int, length: int, device: torch.device | str) -> Held:
        """Places that nobody has."""
        shape = places, length
        tokens, argmax = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        return cls(
            whole=torch.zeros(places, 7 + ENDS, dtype=torch.int64, device=device),
            real=torch.zeros(places, LEVELS.value + 3, device=device),
            counts=torch.zeros(places, 2, dtype=torch.int64, device=device),
            pins=torch.full_like(tokens, -1),
            tokens=tokens,
            argmax=argmax,
            accepted=torch.zeros(shape, dtype=torch.bool, device=device),
            entropies=torch.zeros(shape, device=device),
        )


@triton.jit
def _again(places, canvas, place):
    """Whether a place was given to an earlier one of the canvases: only the first may write, since all read."""
    found = 0
    for first in range(0, canvas, 128):
        others = first + tl.arange(0, 128)
        other = tl.load(places + others, mask=others < canvas, other=-1)
        found += tl.sum((other == place).to(tl.int32), 0)
    return found > 0


@triton.jit
def _ask_kernel(places, whole, real, counts, heats, uniforms, n, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    canvas, spots = tl.program_id(0), tl.arange(0, WIDTH)
    place = tl.load(places + canvas)
    own, level, number = whole + place * COLUMNS, real + place * (LEVELS + 3), tl.load(counts + place * 2)
    steps = tl.load(own + STEPS)
    left = tl.div_rn((steps - number).to(tl.float32), steps.to(tl.float32))
    heat = (tl.load(level + START) + tl.load(level + SPAN) * left) * tl.load(level + HEAT)
    upper = (number + 1).to(tl.uint64) | (tl.load(own + INDEX).to(tl.uint64) << 32)
    uniform = units(spots, upper, SAMPLE, tl.load(own + SEED).to(tl.uint64, bitcast=True))
    there, inside = canvas * n + spots, spots < n
    tl.store(heats + there, tl.zeros((WIDTH,), tl.float32) + heat, mask=inside)
    tl.store(uniforms + there, uniform.to(tl.float32), mask=inside)


@triton.jit
def _settle_kernel(
    places, argmaxes, samples, entropies, whole, real, counts, pins, tokens, likeliest, accepted, kept, flags, n, L,
    words, COLUMNS: tl.constexpr, ENDS: tl.constexpr, OVER: tl.constexpr, BROKEN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    canvas, spots = tl.program_id(0), tl.arange(0, WIDTH)
    place = tl.load(places + canvas)
    if _again(places, canvas, place):
        return
    own, level, count = whole + place * COLUMNS, real + place * (LEVELS + 3), counts + place * 2
    there, here, exists = canvas * n + spots, place * L + spots, spots < n
    length, number = tl.load(own + LENGTH), tl.load(count) + 1
    inside = spots < length
    entropy = tl.load(entropies + there, mask=exists, other=0.0)
    broken = tl.max((inside & ((tl.abs(entropy) < float("inf")) == 0)).to(tl.int32), 0)

    # The sum of the entropies before each in rising order, positions with the same one in theirs.
    before = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, n, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other = tl.load(entropies + canvas * n + others, mask=others < length, other=float("inf"))[None, :]
        same = (other == entropy[:, None]) & (others[None, :] < spots[:, None])
        before += tl.sum(tl.where((other < entropy[:, None]) | same, other, 0.0).to(tl.float64), 1)
    taken = inside & ((before + entropy).to(tl.float32) - entropy <= tl.load(level + BOUND))

    argmax = tl.load(argmaxes + there, mask=exists, other=0)
    sample = tl.load(samples + there, mask=exists, other=0)
    upper = number.to(tl.uint64) | (tl.load(own + INDEX).to(tl.uint64) << 32)
    noise = (units(spots, upper, NOISE, tl.load(own + SEED).to(tl.uint64, bitcast=True)) * words).to(tl.int64)
    pin = tl.load(pins + here, mask=exists, other=-1)
    likely = tl.where(pin >= 0, pin, argmax)
    following = tl.where(taken, tl.where(tl.load(own + GREEDY) != 0, argmax, sample), noise)
    following = tl.where(pin >= 0, pin, following)

    ends = tl.load(own + FIRST_END + tl.arange(0, ENDS))
    is_end = tl.max((likely[:, None] == ends[None, :]).to(tl.int32), 1) != 0
    end = tl.min(tl.where(is_end, spots, n), 0)
    part = inside & ((tl.load(own + PARTIAL) == 0) | (spots <= end))
    moved = tl.max((part & (likely != tl.load(likeliest + here, mask=exists, other=-1))).to(tl.int32), 0)
    steady = tl.where(moved != 0, 0, tl.load(count + 1) + 1)
    mean = tl.sum(tl.where(part, entropy, 0.0).to(tl.float64), 0) / tl.sum(part.to(tl.int32), 0)
    sure = (steady >= tl.load(own + STABLE)) & (mean.to(tl.float32) < tl.load(level + CONFIDENCE))
    over = sure | (number >= tl.load(own + STEPS))

    tl.store(tokens + here, following, mask=exists)
    tl.store(likeliest + here, likely, mask=exists)
    tl.store(accepted + here, taken | (pin >= 0), mask=exists)
    tl.store(kept + here, entropy, mask=exists)
    tl.store(count, number)
    tl.store(count + 1, steady)
    tl.store(flags + canvas, tl.where(broken != 0, BROKEN, over.to(tl.int32) * OVER).to(tl.uint8))


@triton.jit
def _keep_kernel(places, parts, soft, n, L, H, scale, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    row, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside, place = lanes < H, tl.load(places + row // n)
    if _again(places, row // n, place):
        return
    value = tl.zeros((WIDTH,), tl.float32)
    for split in tl.static_range(SPLITS):
        value += tl.load(parts + (split * tl.num_programs(0) + row) * H + lanes, mask=inside, other=0.0)
    there = soft + (place * L + row % n) * H + lanes
    tl.store(there, narrow(value * scale, soft.dtype.element_ty), mask=inside)


@triton.jit
def _roll_kernel(asked, uniforms, n, WIDTH: tl.constexpr):
    lanes = tl.arange(0, WIDTH)
    seed = tl.load(asked + lanes, mask=lanes < n, other=0).to(tl.uint64, bitcast=True)
    upper = tl.load(asked + n + lanes, mask=lanes < n, other=0).to(tl.uint64) << 32
    tl.store(uniforms + lanes, units(lanes * 0, upper, SAMPLE, seed).to(tl.float32), mask=lanes < n)


@triton.jit
def _choose_kernel(asked, argmaxes, samples, entropies, words, n, WIDTH: tl.constexpr):
    lanes = tl.arange(0, WIDTH)
    inside = lanes < n
    greedy = tl.load(asked + 2 * n + lanes, mask=inside, other=0) != 0
    argmax, sample = tl.load(argmaxes + lanes, mask=inside, other=0), tl.load(samples + lanes, mask=inside, other=0)
    sound = tl.abs(tl.load(entropies + lanes, mask=inside, other=0.0)) < float("inf")
    tl.store(words + lanes, tl.where(sound, tl.where(greedy, argmax, sample), -1), mask=inside)


def ask(held: Held, places: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Temperatures, and numbers in [0, 1) to sample with, of the next step of canvases at places int64 [M]: float32
    [M * n] each, of n positions a canvas.
    """
    heats, uniforms = torch.empty(2, len(places) * n, device=places.device)
    _ask_kernel[(len(places),)](
        places, *held[:3], heats, uniforms, n, COLUMNS=7 + ENDS, WIDTH=power(n), num_warps=4, enable_fp_fusion=False
    )
    return heats, uniforms


def settle(held: Held, found: Belief, places: Tensor, flags: Tensor, vocabulary: int) -> None:
    """A step of canvases at places int64 [M], of what was found of n positions each ([M * n]; n is no less than the
    longest's length): changes what is held, and says in `flags`, uint8 [M], how each canvas stands.

    A place may be given twice. What is found then must be the same; the first counts, and the others have no flag.
    """
    n = len(found.argmax) // len(places)
    _settle_kernel[(len(places),)](
        places, *found, *held, flags, n, held.tokens.shape[1], vocabulary, COLUMNS=7 + ENDS, ENDS=ENDS, OVER=OVER,
        BROKEN=BROKEN, WIDTH=power(n), BLOCK=16, num_warps=8,
    )  # fmt: skip


def keep(parts: Tensor, scale: float, soft: Tensor, places: Tensor) -> None:
    """Adds up the parts of a blend, float32 [S, M * n, H], in order, and keeps the sums times a scale as what the
    canvases at places int64 [M] have in `soft` [P, L, H].
    """
    splits, rows, width = parts.shape
    _keep_kernel[(rows,)](
        places, parts, soft, rows // len(places), soft.shape[1], width, scale, SPLITS=splits, WIDTH=power(width),
        num_warps=8,
    )  # fmt: skip


def roll(asked: Tensor) -> Tensor:
    """Numbers in [0, 1), float32 [n], to sample single tokens with.

    Args:
        asked: int64 [3, n]: seeds, how many tokens their answers have, 1 where the likeliest word is taken.
    """
    n = asked.shape[1]
    uniforms = torch.empty(n, device=asked.device)
    _roll_kernel[(1,)](asked, uniforms, n, WIDTH=power(n), num_warps=4)
    return uniforms


def choose(asked: Tensor, found: Belief, tokens: Tensor) -> None:
    """Writes to `tokens`, int64 [n], what is taken of what was found; -1 where the scores are no numbers."""
    n = asked.shape[1]
    _choose_kernel[(1,)](asked, *found, tokens, n, WIDTH=power(n), num_warps=4)
