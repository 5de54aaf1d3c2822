"""The vocabulary step against `kernels.reference` and a plain product."""

from __future__ import annotations

import pytest
import torch
from gpu_tensors import DEVICE, near, numbers, room, weight

from dgemma.kernels import plain, reference
from dgemma.kernels.triton.common import operand
from dgemma.kernels.triton.linear import ready
from dgemma.kernels.triton.vocabulary import step
from dgemma.kernels.wish import Wish


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize(("n", "words", "width"), [(1, 5, 32), (5, 300, 40), (70, 515, 64)])
def test_step(form: str, n: int, words: int, width: int) -> None:
    """Words, entropies, samples and blends, with a cap, a bias, refused words."""
    kind = torch.bfloat16 if form == "bfloat16" else torch.float32
    hidden, table = numbers(n, width, dtype=kind, scale=6.0), weight(form, words, width)
    wish = Wish(heat=0.7, cap=8.0, bias=((words - 1, 1.5), (2, -0.5)), ends=(0, 3), barred=2)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    uniform[0] = 0.0
    raw = plain.linear(hidden, table) if kind == torch.float32 else hidden.float() @ table.float().T
    wanted, weights, total = reference.read(raw.cpu(), wish, uniform.cpu())
    barred = (torch.arange(n) < wish.barred).to(DEVICE, torch.int8)
    found = step(
        hidden, table, heats=torch.full((n,), wish.heat, device=DEVICE), cap=wish.cap, tolerance=2.0**-25,
        uniform=uniform, barred=barred, ends=torch.tensor(wish.ends, device=DEVICE),
        bias=(torch.tensor([words - 1, 2], device=DEVICE), torch.tensor([1.5, -0.5], device=DEVICE)),
    )  # fmt: skip
    share = (weights / total).to(DEVICE)
    chosen = share.gather(1, found.found.argmax[:, None])
    assert torch.all(chosen >= share.amax(dim=1, keepdim=True) * (1 - room(form, 1e-4, 2**-4)))
    near(found.found.entropies, wanted.entropies.to(DEVICE), room(form, 1e-4, 2**-5))
    ends = share.double().cumsum(dim=1)
    end = ends.gather(1, found.found.sampled[:, None])[:, 0]
    begin = end - share.double().gather(1, found.found.sampled[:, None])[:, 0]
    off = room(form, 1e-5, 2**-5) if kind == torch.float32 else 2**-8
    assert torch.all((begin <= uniform + off) & (end >= uniform - off)) and torch.all(end > begin)
    plain_table = table.float() if isinstance(table, torch.Tensor) else table.dequantize()
    near(found.soft, share @ plain_table, 2**-7 if kind == torch.bfloat16 else room(form, 1e-5, 2**-5))


@pytest.mark.parametrize("form", ["bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("heats", [[0.8, 0.4], [0.8, 0.4, 0.2, 0.02]])
def test_weights_with_one_reference(form: str, heats: list[float]) -> None:
    """bfloat16 under a soft-cap: sure and unsure positions, temperatures at which its exponent holds all weights, and
    some at which it does not."""
    n, words, width = 2 * len(heats), 300, 64
    hidden, table = numbers(n, width, dtype=torch.bfloat16), weight(form, words, width)
    entries = table.float() if isinstance(table, torch.Tensor) else table.dequantize()
    hidden[: len(heats)] = (entries[7] * 100 / entries[7].norm()).bfloat16()  # near the cap
    heat = torch.tensor(heats * 2, device=DEVICE)
    uniform = torch.full((n,), 0.5, device=DEVICE)
    step_of = step(hidden, table, heats=heat, cap=30.0, tolerance=2.0**-9, uniform=uniform)
    raw = (ready(hidden, operand(table)).values.float() if form != "fp8" else hidden.float()) @ entries.T
    scores = torch.tanh(raw / 30.0) * 30.0 / heat[:, None]
    near(step_of.soft, torch.softmax(scores, dim=-1) @ entries, 2**-4 if form == "fp8" else 2**-6)
    assert (
        step_of.found.argmax[: len(heats)].tolist() == step_of.found.sampled[: len(heats)].tolist() == [7] * len(heats)
    )


def test_sure_positions_leave_tiles_out() -> None:
    """What is left out is within the tolerance, and a row's result does not depend on the others."""
    table = torch.cat([numbers(700, 32), numbers(1, 32)])
    hidden = torch.stack([table[3] * 4, table[650] * 4, numbers(32, scale=0.01)])
    heats = torch.ones(3, device=DEVICE)
    found = step(hidden, table, heats=heats, cap=None, tolerance=2.0**-9)
    assert found.found.argmax[:2].tolist() == [3, 650] and 0 < float(found.share) < 0.8
    near(found.soft, torch.softmax(hidden @ table.T, dim=-1) @ table, 2.0**-8)
    alone = step(hidden[1:2], table, heats=heats[:1], cap=None, tolerance=2.0**-9)
    near(alone.soft, found.soft[1:2], 1e-6)


def test_broken_scores_are_named() -> None:
    """NaN and infinity: entropy NaN, word 0; other positions as before."""
    table, hidden = numbers(200, 32), numbers(4, 32)
    hidden[1, 0], hidden[2, 0] = float("nan"), float("inf")
    heats, uniform = torch.full((2, 4), 0.5, device=DEVICE)
    found = step(hidden, table, heats=heats, cap=30.0, tolerance=1e-6, uniform=uniform).found
    assert torch.isnan(found.entropies).tolist() == [False, True, True, False]
    assert found.argmax[1:3].tolist() == found.sampled[1:3].tolist() == [0, 0]


class Listening:
    """A rank alone: what it would tell the others is kept, and they are silent."""

    def __init__(self, rank: int, word_counts: list[int], heard: list[torch.Tensor]):
        self.rank, self.word_counts, self.heard = rank, word_counts, heard
        self.told: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        self.told.append(x.clone())
        return torch.stack(self.heard or [x] * len(self.word_counts))

    def total(self, x: torch.Tensor) -> torch.Tensor:
        self.given.append(x)
        return x


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("counts", [[300, 215], [129, 1, 385], [128, 129, 129, 129]])
def test_a_table_in_parts(form: str, counts: list[int]) -> None:
    """Ranks with words of their own find together what one finds with all: refused words, biases and samples too."""
    n, words, width = 9, sum(counts), 40
    hidden, table = numbers(n, width, scale=3.0), weight(form, words, width)
    wish = {
        "heats": torch.linspace(0.2, 1.5, n, device=DEVICE), "cap": 8.0, "tolerance": 2.0**-25,
        "uniform": torch.rand(n, generator=torch.Generator().manual_seed(1)).to(DEVICE),
        "barred": torch.ones(n, dtype=torch.int8, device=DEVICE), "ends": torch.tensor([3, 401], device=DEVICE),
        "bias": (torch.tensor([words - 1, 2], device=DEVICE), torch.tensor([2.5, -0.5], device=DEVICE)),
    }  # fmt: skip
    whole = step(hidden, table, **wish)
    begins = [sum(counts[:rank]) for rank in range(len(counts))]
    parts = [table[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]
    told = []
    for rank, part in enumerate(parts):
        listening = Listening(rank, counts, [])
        step(hidden, part, **wish, peers=listening)
        told += listening.told
    ranks = [Listening(rank, counts, told) for rank in range(len(counts))]
    found = [step(hidden, part, **wish, peers=rank) for part, rank in zip(parts, ranks, strict=True)]
    for own in found:
        assert torch.equal(own.found.argmax, whole.found.argmax)
        near(own.found.entropies, whole.found.entropies, 1e-5)
    samples, blends = zip(*(rank.given for rank in ranks), strict=True)
    assert torch.equal(sum(samples), whole.found.sampled) and len(set(whole.found.sampled.tolist())) > 4
    near(sum(blends), whole.soft, 1e-5)
