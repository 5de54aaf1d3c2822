"""A step's inputs: each row's place by a brute-force formula, and the same in all the ways that they come about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_tensors import DEVICE

from dgemma.config import ModelConfig
from dgemma.engine.forward import Work
from dgemma.engine.inputs import Parcel, Planner, Seated
from dgemma.engine.pages import Pages, Table
from dgemma.params import SamplingParams
from tiny import Spec, build

SIZE, WINDOW, CANVAS = 4, 6, 8
SPEC = Spec(name="inputs", layers="sf", window=WINDOW, canvas=CANVAS, vocab=50, hidden=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.read(build(SPEC, tmp_path_factory.mktemp("checkpoint") / "inputs") / "config.json")


class Batch:
    """Requests with so many tokens encoded, and room for more."""

    def __init__(self, config: ModelConfig, lengths: list[int]):
        self.pages = Pages(size=SIZE, window=WINDOW, full=64, sliding=64)
        self.pages.full.take(), self.pages.sliding.take()
        self.rows, self.planner = [], Planner(config, self.pages, length=CANVAS, limit=64, size=4)
        for number, length in enumerate(lengths):
            table = Table(self.pages)
            table.reserve(length + 2 * CANVAS)
            history = [(7 * number + place) % 50 for place in range(64)]
            table.advance(history, length)
            params = SamplingParams(temperature=0.5 * number, top_k=number or None, top_p=1 - 0.1 * number)
            request = SimpleNamespace(seed=number - 1, params=params)
            self.rows.append(SimpleNamespace(table=table, history=history, tokens=[0] * number, request=request))

    def plan(self, encode: list[int], denoise: list[int], own: int, *, draws: bool = True) -> Any:
        """Each request's count to encode; the canvases' lengths, of the last requests."""
        works = [Work(row, count, False) for row, count in zip(self.rows, encode, strict=False)]
        seated = []
        for place, length in enumerate(denoise):
            row = self.rows[len(self.rows) - 1 - place]
            row.history = row.history[: row.table.length]
            canvas = SimpleNamespace(params=row.request.params)
            seated.append(Seated(Work(row, 0, True, denoised=length), canvas, 5 - place))
        return works, self.planner.plan(works, seated, own, draws=[draws] * len(works))


@pytest.mark.parametrize(
    ("lengths", "encode", "denoise", "own", "pitch", "width"),
    [
        ([3, 9, 21], [1, 1, 1], [], 0, 1, 1),
        ([3, 9, 21, 30, 7], [1, 1], [8, 5, 8], 2, 1, 8),
        ([0, 5, 21, 30], [3, 5], [3], 1, 8, 8),
        ([0, 5, 21, 30], [11, 1], [3, 8], 2, None, None),
    ],
)
def test_every_row_is_where_it_belongs(
    config: ModelConfig, lengths: list[int], encode: list[int], denoise: list[int], own: int, pitch: Any, width: Any
) -> None:
    """Single tokens, canvases beside them, short and long chunks; fill is written nowhere."""
    batch = Batch(config, lengths)
    works, (starts, inputs, key) = batch.plan(encode, denoise, own)
    assert (key and key.pitch, key and key.width) == (pitch, width)
    layout, real = inputs.layout, set()
    for number, (work, start) in enumerate(zip(works, starts, strict=False)):
        table, first = work.row.table, work.row.table.length
        for spot in range(work.encode):
            row, position = start + spot, first + spot
            real.add(row)
            assert layout.positions[row] == position and inputs.tokens[row] == work.row.history[position]
            for sliding, pages in ((False, table.full), (True, table.sliding)):
                assert layout.slots[sliding][row] == pages[position // SIZE] * SIZE + position % SIZE
        assert inputs.lasts[number] == start + work.encode - 1
        params = work.row.request.params
        wanted = [work.row.request.seed, len(work.row.tokens), int(params.temperature == 0)]
        assert inputs.asked[:, number].tolist() == wanted
        levels = params.temperature or 1.0, params.top_k or 0, params.top_p, 0.0
        assert inputs.levels[:, number].tolist() == pytest.approx(levels)
    for sliding in (False, True):
        assert all(slot == -1 for row, slot in enumerate(layout.slots[sliding].tolist()) if row not in real)
    for number, (length, start) in enumerate(zip(denoise, starts[len(works) :], strict=True)):
        first = batch.rows[len(batch.rows) - 1 - number].table.length
        rows, place = range(start, start + length), 5 - number
        assert layout.positions[rows].tolist() == [*range(first, first + length)]
        assert inputs.spots[start - layout.encoded :][:length].tolist() == [place * CANVAS + n for n in range(length)]
        if number < own:
            sampled = inputs.rows.view(len(inputs.places), -1)[number]
            assert inputs.places[number] == place and sampled[:length].tolist() == [*rows]
            assert set(sampled[length:].tolist()) <= {rows[-1]}
    assert not own or set(inputs.places[own:].tolist()) <= {5}
    total = layout.encoded + len(inputs.spots)
    assert len(layout.positions) == total and inputs.rows.lt(total).all() and inputs.lasts.lt(layout.encoded).all()


@pytest.mark.parametrize("denoise", [[], [8, 5]])
def test_the_next_tokens_step_is_the_one_laid_out(config: ModelConfig, denoise: list[int]) -> None:
    """What is written into the last step's inputs is what laying out the next one gives, while no page is full and the
    window leaves none."""
    batch = Batch(config, [4, 13, 21, 30, 7])
    works, planned = batch.plan([1, 1, 1], denoise, len(denoise))
    parcel = Parcel(planned.inputs, torch.device(DEVICE))
    parcel.pack(planned.inputs)
    for _ in range(2):
        for work in works:
            work.row.table.advance(work.row.history, 1)
            work.row.tokens.append(0)
        parcel.here.follow(works)
        parcel.send()
        _, wanted = batch.plan([1, 1, 1], denoise, len(denoise))
        assert wanted.key == planned.key
        for own, sent, right in zip(
            parcel.here.tensors(), parcel.there.tensors(), wanted.inputs.tensors(), strict=True
        ):
            assert torch.equal(own, right) and torch.equal(sent.cpu(), right)
            assert own.dtype == right.dtype and sent.data_ptr() % 16 == 0
