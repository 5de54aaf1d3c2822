"""A step's sampling on the card against `diffusion.Canvas`, step by step, over canvases of all kinds at once."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_tensors import DEVICE, numbers
from torch import Tensor

from dgemma.diffusion import Canvas, CounterDraws
from dgemma.diffusion.policy import TRANSFORMERS
from dgemma.diffusion.sampling import accept
from dgemma.engine.board import Board
from dgemma.kernels.belief import Belief
from dgemma.kernels.triton import settle
from dgemma.kernels.triton.settle import BROKEN, GOES_ON, OVER
from dgemma.params import GenerationConfig, SamplingParams

WORDS, WIDTH, STEPS = 11, 4, 6
# What is asked for: parameters and settings. Entropies are about 0.3, or of a few values, or mostly zeros.
ASKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "nothing but the first": ({}, {"entropy_bound": 0.0}),
    "all": ({}, {"entropy_bound": 1e9}),
    "greedy": ({"temperature": 0.0}, {"entropy_bound": 1.0, "stability_threshold": 0, "confidence_threshold": 0.3}),
    "warm": ({"temperature": 0.7}, {"t_min": 0.1, "t_max": 1.3, "entropy_bound": 0.5, "max_denoising_steps": 3}),
    "to the end token": ({"stop_at_end": True, "stop_token_ids": (3, 4, 9)}, {"confidence_threshold": 0.5}),
    "to the end token, twice stable": ({"stop_at_end": True}, {"stability_threshold": 2, "confidence_threshold": 9.0}),
    "stable at once": ({}, {"stability_threshold": 0, "confidence_threshold": 0.2}),
    "stable twice": ({}, {"stability_threshold": 2, "confidence_threshold": 9.0, "entropy_bound": 2.0}),
}
SETTINGS = {"max_denoising_steps": STEPS, "confidence_threshold": 9.0, "eos_token_ids": (5, 7)}


def board_of(places: int, length: int) -> Board:
    """A board for canvases alone: nothing is looked at through its network."""
    config = SimpleNamespace(hidden_size=WIDTH)
    network = SimpleNamespace(
        device=torch.device(DEVICE), dtype=torch.float32, config=config, embedding_scale=lambda: torch.tensor(2.0)
    )
    return Board(network, places, length)  # type: ignore[arg-type]


def canvas_of(asked: str, length: int, number: int) -> tuple[Canvas, int]:
    """A canvas, and the seed of its draws."""
    params, settings = ASKED[asked]
    seed, index = 2**64 - 1 - number if number % 2 else number, 3 * number
    canvas = Canvas(
        SamplingParams(**params), GenerationConfig(**{**SETTINGS, **settings}), rows=1, length=length,
        vocabulary=WORDS, index=index, before=0, policy=TRANSFORMERS, draws=CounterDraws([seed]),
    )  # fmt: skip
    return canvas, seed


def belief_of(canvas: Canvas, generator: torch.Generator) -> Belief:
    """What a network might find: likeliest words that often stay, entropies with ties and zeros."""
    length = canvas.tokens.shape[1]

    def whole(top: int) -> Tensor:
        return torch.randint(0, top, (1, length), generator=generator)

    entropies = (-torch.log(torch.rand(1, length, generator=generator)) * 0.3, whole(4) / 4, (whole(9) == 0) * 0.125)
    likeliest = canvas.likeliest if whole(4)[0, 0] and canvas.likeliest is not None else whole(WORDS)
    return Belief(likeliest, whole(WORDS), entropies[int(whole(3)[0, 0])])


@pytest.mark.parametrize("length", [1, 3, 17, 64, 200, 256])
def test_equal_to_a_canvas(length: int) -> None:
    """Canvases of this length and shorter ones, with pins and without, in places given twice, until all are over."""
    generator = torch.Generator().manual_seed(length)
    board = board_of(len(ASKED) + 1, length)
    going: dict[int, Canvas] = {}
    for number, asked in enumerate(ASKED):
        canvas, seed = canvas_of(asked, max(1, length - number * length // 12), number)
        board.begin(number + 1, canvas, seed)
        if number % 3 == 0:
            drawn = torch.randint(-3 * WORDS, WORDS, canvas.pins.shape, generator=generator)
            canvas.pins = drawn.clamp_min(-1)
            board.pin(number + 1, canvas.pins[0])
        going[number + 1] = canvas
    stands = set()
    for step in range(1, STEPS + 1):
        places = list(going)[::-1]
        given = torch.tensor([*places, places[-1], places[0], places[0]], device=DEVICE)
        heats, uniforms = (part.view(-1, length) for part in settle.ask(board.held, given, length))
        assert heats.amin(dim=1).tolist() == heats.amax(dim=1).tolist()
        found = {place: belief_of(canvas, generator) for place, canvas in going.items()}
        rows = [[torch.nn.functional.pad(part[0], (0, length - part.shape[1])) for part in found[p]] for p in places]
        rows += [rows[-1], rows[0], rows[0]]
        flags = torch.full((len(given),), 9, dtype=torch.uint8, device=DEVICE)
        belief = Belief(*(torch.cat(parts).to(DEVICE) for parts in zip(*rows, strict=True)))
        settle.settle(board.held, belief, given, flags, WORDS)
        for row, place in enumerate(places):
            canvas, own = going[place], found[place]
            assert canvas.wish is not None and float(heats[row, 0]) == canvas.wish.heat
            wanted = canvas.draws.uniform(canvas.index, step, CounterDraws.SAMPLE, length)  # type: ignore[attr-defined]
            assert torch.equal(uniforms[row].cpu(), wanted[0].float())
            own = own._replace(sampled=own.argmax) if canvas.params.temperature == 0 else own
            right, brought = canvas.update(own), board.step_of(place, canvas, whole=True)
            assert torch.equal(brought.canvas, right.canvas) and torch.equal(brought.argmax, right.argmax)
            assert torch.equal(brought.accepted, right.accepted) and torch.equal(brought.entropies, right.entropies)
            assert flags[row] == (OVER if canvas.over else GOES_ON)
            stands.add(int(flags[row]))
        going = {place: canvas for place, canvas in going.items() if not canvas.over}
        if not going:
            break
    assert not going and stands == {GOES_ON, OVER}


def test_broken_canvases_fail_alone() -> None:
    """NaN and infinity; behind a canvas's end they are nobody's."""
    board, generator, length = board_of(4, 20), torch.Generator().manual_seed(0), 20
    canvases = [canvas_of("stable twice", length - 3 * (place == 2), place)[0] for place in range(4)]
    for place, canvas in enumerate(canvases):
        board.begin(place, canvas, 0)
    entropies = torch.rand(4, length, generator=generator)
    entropies[0, 0], entropies[1, 19], entropies[2, 17] = float("nan"), float("inf"), float("nan")
    words = torch.zeros(4 * length, dtype=torch.int64, device=DEVICE)
    flags = torch.zeros(4, dtype=torch.uint8, device=DEVICE)
    belief = Belief(words, words, entropies.flatten().to(DEVICE))
    settle.settle(board.held, belief, torch.arange(4, device=DEVICE), flags, WORDS)
    assert flags.tolist() == [BROKEN, BROKEN, GOES_ON, GOES_ON]
    assert torch.equal(board.held.accepted[3].cpu(), accept(entropies[3:], 2.0)[0])


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_sums_at_the_bound(spread: float) -> None:
    """Bounds that are sums of the entropies themselves, and the next numbers to them: as the reference rounds."""
    length, rows = 256, 10
    entropies = 0.05 * torch.exp(numbers(rows, length, seed=int(spread)).cpu() * spread)
    rising = entropies.sort(dim=-1).values
    bounds = (rising.cumsum(dim=-1) - rising)[torch.arange(rows), torch.arange(rows) * 25 + 5]
    for target in (float("-inf"), None, float("inf")):
        bound = bounds if target is None else torch.nextafter(bounds, torch.tensor(target))
        held = settle.Held.empty(rows, length, DEVICE)
        held.whole[:, settle.LENGTH.value] = length
        held.real[:, settle.BOUND.value] = bound.to(DEVICE)
        words = torch.zeros(rows * length, dtype=torch.int64, device=DEVICE)
        flags = torch.zeros(rows, dtype=torch.uint8, device=DEVICE)
        belief = Belief(words, words, entropies.flatten().to(DEVICE))
        settle.settle(held, belief, torch.arange(rows, device=DEVICE), flags, WORDS)
        assert torch.equal(held.accepted.cpu(), accept(entropies, bound[:, None]))


def test_soft_embeddings_are_kept() -> None:
    """Parts added up in order, scaled, rounded, at their places; what others hold stays."""
    rows, n, length, width = 3, 5, 7, 40
    parts = numbers(4, rows * n, width)
    for dtype in (torch.float32, torch.bfloat16):
        soft = torch.full((4, length, width), 9.0, dtype=dtype, device=DEVICE)
        again = torch.cat([parts, parts[:, :n] + 1], dim=1)  # a place given twice: the first counts
        settle.keep(again, 6.5, soft, torch.tensor([3, 0, 2, 3], device=DEVICE))
        wanted = torch.full_like(soft, 9.0)
        total = list(itertools.accumulate(parts, torch.add))[-1]
        wanted[[3, 0, 2], :n] = (total * 6.5).to(dtype).view(rows, n, width)
        assert torch.equal(soft, wanted)
