"""Examples as token ids, and batches of them: bucketed by length, seeded, resumable at any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One conversation: what is given, the final assistant turn with its end token, and whether others would do."""

    prompt: list[int]
    response: list[int]
    open: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """B clean sequences and R of their canvases. S is the longest sequence, L the canvas length.

    Fields:
        tokens: [B, S] int64, padded on the right.
        lengths, prompts: tokens and prompt tokens of each sequence, [B].
        owner: which sequence a canvas belongs to, [R].
        start: where the canvas begins in its sequence, [R].
        canvas: the clean canvas, filled up with end tokens, [R, L].
        filled: which of its positions are fill, [R, L] bool.
        open: whether it is of a response that others could stand for, [R] bool.
    """

    tokens: Tensor
    lengths: Tensor
    prompts: Tensor
    owner: Tensor
    start: Tensor
    canvas: Tensor
    filled: Tensor
    open: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How samples become batches.

    Fields:
        positions: token positions of one batch at most; one on a canvas counts double (see `_cost`).
        canvas_lengths: the lengths a batch's canvases may have, with their shares of batches.
        per_sample: canvases of one response in one batch at most.
        noises: how often each canvas is noised, for one encoding of what precedes it.
        pool: samples that are drawn at once and sorted into batches by length.
    """

    positions: int
    canvas_lengths: dict[int, float]
    per_sample: int = 1
    noises: int = 1
    pool: int = 2048


def collate(
    samples: Sequence[Sample], canvas_length: int, batching: Batching, end: int, pad: int, rng: random.Random
) -> Batch:
    """Makes a batch; of each response up to `per_sample` different canvases, drawn uniformly, each `noises` times,
    in random order.

    The last, partial canvas of a response is filled with end tokens, and the fill is part of the target.
    """
    width = max(len(sample) for sample in samples)
    tokens = torch.full((len(samples), width), pad)
    places = []
    for index, sample in enumerate(samples):
        tokens[index, : len(sample)] = torch.tensor(sample.prompt + sample.response)
        count = -(-len(sample.response) // canvas_length)
        numbers = rng.sample(range(count), min(count, batching.per_sample))
        places += [(index, number) for number in numbers] * batching.noises
    rng.shuffle(places)
    parts = [samples[index].response[number * canvas_length :][:canvas_length] for index, number in places]
    fills = [canvas_length - len(part) for part in parts]
    return Batch(
        tokens=tokens,
        lengths=torch.tensor([len(sample) for sample in samples]),
        prompts=torch.tensor([len(sample.prompt) for sample in samples]),
        owner=torch.tensor([index for index, _ in places]),
        start=torch.tensor([len(samples[index].prompt) + number * canvas_length for index, number in places]),
        canvas=torch.tensor([part + [end] * fill for part, fill in zip(parts, fills, strict=True)]),
        filled=torch.tensor([[False] * len(part) + [True] * fill for part, fill in zip(parts, fills, strict=True)]),
        open=torch.tensor([samples[index].open for index, _ in places]),
    )


def pools(
    draw: Callable[[random.Random, int], Sample],
    batching: Callable[[int], Batching],
    *,
    end: int,
    pad: int,
    seed: int,
    pool: int = 0,
    skip: int = 0,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[int, int, Batch]]:
    """Endless batches with their address (pool, round in the pool); any address can be resumed at.

    Args:
        draw: makes one sample from a random generator, for a pool number.
        batching: the settings for a pool number; like the samples, they may change as training goes on.
        share: (rank, processes): in every round each process gets a batch of its own.
    """
    while True:
        rng = random.Random(f"{seed} pool {pool}")
        settings = batching(pool)
        samples = sorted((draw(rng, pool) for _ in range(settings.pool)), key=len)
        groups: list[tuple[int, list[Sample]]] = []
        while samples:
            (length,) = rng.choices(list(settings.canvas_lengths), list(settings.canvas_lengths.values()))
            # Take from a random place of the sorted pool, so that every canvas length meets every sequence length.
            first = rng.randrange(len(samples))
            size = max(1, settings.positions // _cost(samples[first], length, settings))
            groups.append((length, samples[max(0, first - size) : first + 1]))
            del samples[max(0, first - size) : first + 1]
        rng.shuffle(groups)
        rank, processes = share
        for number in range(skip, len(groups) // processes):
            length, group = groups[number * processes + rank]
            batch_rng = random.Random(f"{seed} pool {pool} batch {number * processes + rank}")
            yield pool, number, collate(group, length, settings, end, pad, batch_rng)
        pool, skip = pool + 1, 0


def _cost(sample: Sample, canvas_length: int, batching: Batching) -> int:
    """What a sample costs in encoded positions: a canvas position passes the vocabulary too, and half of them twice."""
    canvases = min(batching.per_sample, -(-len(sample.response) // canvas_length)) * batching.noises
    return len(sample) + 2 * canvases * canvas_length
