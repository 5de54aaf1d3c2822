"""A step's beginning and its sampling on this card, against plain torch; cases of `gpu_kernels`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_case import TOLERANCE, Case, Maker
from torch import Tensor
from torch.nn import functional as F

from dgemma.config import ModelConfig
from dgemma.diffusion import Canvas, CounterDraws
from dgemma.diffusion.policy import TRANSFORMERS
from dgemma.kernels.belief import Belief
from dgemma.kernels.triton import layer, settle
from dgemma.kernels.triton.common import operand
from dgemma.model.rope import inverse_frequencies, rotation
from dgemma.params import GenerationConfig, SamplingParams


def sampling(config: ModelConfig, make: Maker, canvases: int) -> Iterator[Case]:
    """What canvases do of what was found of them, and how the blend becomes soft embeddings."""
    length, hidden, device = config.canvas_length, config.hidden_size, make.device
    rows, settings, places = canvases * length, GenerationConfig(), torch.arange(canvases, device=device)
    words = torch.randint(config.vocab_size, (2, rows), generator=make.generator, device=device)
    found = Belief(words[0], words[1], make.numbers(rows, dtype=torch.float32).square() * 0.02)
    held, flags = settle.Held.empty(canvases, length, device), torch.empty(canvases, dtype=torch.uint8, device=device)
    for seed in range(canvases):
        whole = seed, 0, length, settings.max_denoising_steps, settings.stability_threshold, 0, 0
        held.whole[seed] = torch.tensor([*whole, *[-1] * settle.ENDS])
        heats = settings.t_min, settings.t_max - settings.t_min, 1.0
        held.real[seed] = torch.tensor([*heats, settings.entropy_bound, settings.confidence_threshold, 0.0, 1.0, 0.0])

    def ours() -> tuple[Tensor, ...]:
        held.counts.zero_()
        settle.ask(held, places, length)
        settle.settle(held, found, places, flags, config.vocab_size)
        return held.tokens, held.argmax, held.accepted

    def twin() -> tuple[Tensor, ...]:
        steps = []
        for seed, own in enumerate(zip(*(part.view(canvases, 1, length) for part in found), strict=True)):
            canvas = Canvas(
                SamplingParams(), settings, rows=1, length=length, vocabulary=config.vocab_size, index=0, before=0,
                policy=TRANSFORMERS, draws=CounterDraws([seed]),
            )  # fmt: skip
            steps.append(canvas.update(Belief(*(part.cpu() for part in own))))
        names = ("canvas", "argmax", "accepted")
        return tuple(torch.cat([getattr(step, name) for step in steps]).to(device) for name in names)

    yield Case(name="settle", ours=ours, twin=twin, tolerance=1e-7)
    parts, soft = make.numbers(4, rows, hidden, dtype=torch.float32), make.numbers(canvases, length, hidden)

    def kept() -> tuple[Tensor, ...]:
        settle.keep(parts, hidden**0.5, soft, places)
        return (soft,)

    def summed() -> tuple[Tensor, ...]:
        return ((parts.sum(dim=0) * hidden**0.5).to(make.dtype).view_as(soft),)

    yield Case(name="keep", ours=kept, twin=summed, library=summed, moved=parts.nbytes, tolerance=TOLERANCE[make.dtype])


def begin(config: ModelConfig, make: Maker, canvases: int, tolerance: float) -> Iterator[Case]:
    """What a step begins with: canvases' embeddings, self-conditioning around its products, rotations."""
    length, hidden, eps, device = config.canvas_length, config.hidden_size, config.rms_norm_eps, make.device
    table, soft, norm = (
        make.numbers(config.vocab_size, hidden),
        make.numbers(canvases, length, hidden),
        make.numbers(hidden),
    )
    tokens = torch.randint(config.vocab_size, (canvases, length), generator=make.generator, device=device)
    spots, positions = torch.arange(tokens.numel(), device=device), torch.arange(tokens.numel(), device=device)

    def ours() -> tuple[Tensor, ...]:
        x, normed = layer.embed(operand(table), 53.0, spots[:0], spots, tokens, soft, norm, eps, operand(table))
        layer.condition(x, normed.values, eps)
        return (x,)

    def twin() -> tuple[Tensor, ...]:
        normed = F.rms_norm(soft.flatten(0, 1).float(), (hidden,), norm.float(), eps).to(make.dtype)
        mixed = F.embedding(tokens.flatten(), table) * 53.0 + normed
        return (F.rms_norm(mixed.float(), (hidden,), None, eps).to(make.dtype),)

    yield Case(name="begin", ours=ours, twin=twin, library=twin, moved=3 * soft.nbytes, tolerance=tolerance)
    shapes = list(dict.fromkeys(config.layers))
    frequencies = torch.cat([inverse_frequencies(shape, device) for shape in shapes])

    def turned() -> tuple[Tensor, ...]:
        kinds = [rotation(positions, shape, make.dtype) for shape in shapes]
        halves = [[part[:, 0, : part.shape[-1] // 2] for part in kind] for kind in kinds]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))

    yield Case(
        name="turns", ours=lambda: layer.turns(positions, frequencies, make.dtype), twin=turned, library=turned,
        tolerance=tolerance,
    )  # fmt: skip
