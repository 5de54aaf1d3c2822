"""The vocabulary step and the reading of scores: against formulas in float64 and the twin that the sampler uses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_weights import random_weight
from torch import Tensor

from dgemma.diffusion.canvas import process, wish_of
from dgemma.kernels import cpu, reference
from dgemma.kernels.belief import Belief, read
from dgemma.params import SamplingParams
from dgemma.quant import Quantized, quantize

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROUNDING = 4e-6  # of entropies and cumulative probabilities from float32 scores


def truth_of(processed: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and entropies of processed scores, in float64."""
    logs = torch.log_softmax(processed.double(), dim=-1)
    return logs.exp(), -(logs.exp() * logs.clamp_min(-1e300)).sum(dim=-1)


def check_samples(found: Belief, probabilities: Tensor, uniform: Tensor, bound: float) -> None:
    """Each sample is the word into whose stretch of [0, 1) the number falls, but for rounding at its ends."""
    ends = probabilities.cumsum(dim=-1)
    after = ends.gather(-1, found.sampled[:, None])[:, 0]
    own = probabilities.gather(-1, found.sampled[:, None])[:, 0]
    assert (own > 0).all()
    assert ((after - own - bound <= uniform) & (uniform <= after + bound)).all()


@many
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 20),
    words=st.sampled_from([3, 50, 63, 64, 65, 1000, 4096]),
    size=st.sampled_from([0.1, 3.0, 30.0, 1000.0]),
    barred=st.integers(0, 3),
    greedy=st.booleans(),
    biased=st.booleans(),
)
def test_read_equals_the_sampler(
    isa: str, seed: int, rows: int, words: int, size: float, barred: int, greedy: bool, biased: bool
) -> None:
    """The same words as `process` and `read` of the sampler, the argmax always, and the same entropies."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, words, generator=generator) * size
    scores[0, -1] = scores[0].max()  # a tie, which the first word wins
    uniform = None if greedy else torch.rand(rows, generator=generator)
    bias = {1: 2.5, words - 1: -1.0} if biased else None
    heat = torch.tensor(0.8) * 0.55
    params = SamplingParams(temperature=0.55, **({"logit_bias": bias} if bias else {}))
    processed = process(scores[None], params, wish_of(params, torch.tensor(0.8), (0, 2), barred))
    belief, weights, totals = read(processed.clone(), None if uniform is None else uniform[None])

    wish = cpu.Wish(heat=float(heat), bias=tuple((bias or {}).items()), ends=(0, 2), barred=barred)
    found, ours, sums = cpu.read(scores.clone(), wish, uniform)
    assert torch.equal(found.argmax, belief.argmax[0])
    probabilities, entropies = truth_of(processed[0])
    assert torch.allclose(found.entropies.double(), entropies, atol=ROUNDING * max(1.0, math.log(words)), rtol=0)
    assert torch.allclose(found.entropies, belief.entropies[0], atol=2e-5, rtol=0)
    assert torch.allclose(ours, weights[0], atol=1e-6) and torch.allclose(sums, totals[0], rtol=1e-5)
    if uniform is None:
        assert torch.equal(found.sampled, found.argmax)
    else:
        check_samples(found, probabilities, uniform, ROUNDING)


def hidden_and_table(
    generator: torch.Generator, rows: int, words: int, width: int, sharp: float
) -> tuple[Tensor, Quantized]:
    """Hidden states that point, more or less, at rows of a table."""
    dense = torch.randn(words, width, generator=generator) * 0.05
    table = quantize(dense, bits=8, group=None, search=False)
    target = torch.randint(0, words, (rows,), generator=generator)
    hidden = dense[target] * sharp + torch.randn(rows, width, generator=generator)
    return hidden, table


@many
@given(
    seed=st.integers(0, 1 << 30),
    rows=st.sampled_from([1, 2, 17, 40, 260]),
    words=st.sampled_from([3, 16, 63, 64, 513, 1024, 2000]),
    width=st.sampled_from([2, 16, 46, 96, 128]),
    sharp=st.sampled_from([0.0, 20.0, 200.0, 3000.0]),
    cap=st.sampled_from([None, 30.0]),
    barred=st.integers(0, 3),
    half=st.booleans(),
)
def test_fused_step(
    isa: str, seed: int, rows: int, words: int, width: int, sharp: float, cap: float | None, barred: int, half: bool
) -> None:
    """The step on a packed table: scores are its twin's bit for bit, so all else is near what follows from them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, table = hidden_and_table(generator, rows, words, width, sharp)
    hidden = hidden.bfloat16() if half else hidden
    uniform = torch.rand(rows, generator=generator)
    hint = torch.randint(-1, words, (rows,), generator=generator)
    wish = cpu.Wish(heat=0.6, cap=cap, bias=((words // 2, 1.5),), ends=(0, 2), barred=barred)
    packed = cpu.pack(table)
    found, soft, share = cpu.vocabulary(hidden, packed, wish, uniform=uniform, hint=hint)

    processed = wish.process(reference.linear(hidden.float(), table))
    probabilities, entropies = truth_of(processed)
    # The cap's tanh is wrong by some 1e-7 of it, and the temperature makes that more.
    rounding = (
        ROUNDING * (1.0 if cap is None else 3.0) * max(1.0, processed.nan_to_num(neginf=0).abs().max().item() / 8)
    )
    best = processed.max(dim=-1).values
    assert (processed.gather(-1, found.argmax[:, None])[:, 0] >= best - rounding).all()
    assert torch.allclose(found.entropies.double(), entropies, atol=10 * rounding, rtol=0)
    check_samples(found, probabilities, uniform, 10 * rounding)

    dense = table.dequantize().double()
    assert soft is not None and 0 <= share <= 1
    wrong = (soft.double() - probabilities @ dense).abs()
    assert (wrong <= blend_bound(probabilities, dense) + 20 * rounding * dense.abs().max()).all()

    again = cpu.vocabulary(hidden, packed, wish, uniform=uniform, soft=False)
    assert again.soft is None
    assert torch.equal(again.found.argmax, found.argmax)
    assert torch.allclose(again.found.entropies, found.entropies, atol=1e-5)


def blend_bound(probabilities: Tensor, dense: Tensor, tolerance: float = 2.0**-9) -> Tensor:
    """How far weights in 7 bits and tiles that are left out may carry a blend: in each 64 words a weight, with its
    word's scale, is rounded to 127 steps of the largest."""
    scales = dense.abs().amax(dim=-1)
    scaled = torch.nn.functional.pad(probabilities * scales, (0, -len(dense) % 64)).unflatten(-1, (-1, 64))
    sizes = torch.nn.functional.pad(scales.sign(), (0, -len(dense) % 64)).unflatten(-1, (-1, 64)).sum(dim=-1)
    rounding = (scaled.amax(dim=-1) / 254 * sizes).sum(dim=-1, keepdim=True)
    return 1.01 * rounding + 2 * tolerance * dense.abs().max()


def sure(generator: torch.Generator) -> tuple[Tensor, Quantized, cpu.Wish]:
    """Positions most of which are sure of a word, as in a canvas that has nearly settled."""
    hidden, table = hidden_and_table(generator, 60, 6000, 96, 150.0)
    hidden[:5] *= 0.03  # and some that are not
    return hidden, table, cpu.Wish(heat=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_do_not_count(isa: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With a good hint most tiles are left out, and the blend stays within the bound of doing them all."""
    hidden, table, wish = sure(torch.Generator().manual_seed(7))
    hidden, packed = hidden.to(dtype), cpu.pack(table)
    found, soft, share = cpu.vocabulary(hidden, packed, wish)
    _, hinted, less = cpu.vocabulary(hidden, packed, wish, hint=found.argmax)
    monkeypatch.setitem(cpu.TOLERANCE, dtype, 0.0)
    _, whole, most = cpu.vocabulary(hidden, packed, wish)
    assert soft is not None and hinted is not None and whole is not None
    monkeypatch.undo()
    bound = 2 * cpu.TOLERANCE[dtype] * table.dequantize().abs().max() + 1e-7
    assert (soft - whole).abs().max() <= bound and (hinted - whole).abs().max() <= bound
    assert most == 1.0 and less < share
    assert less < (0.2 if dtype == torch.bfloat16 else 0.3)


def test_hints_change_nothing_but_time(isa: str) -> None:
    """Right, wrong, refused or none: the same words, and entropies to rounding."""
    generator = torch.Generator().manual_seed(8)
    hidden, table, wish = sure(generator)
    wish = cpu.Wish(heat=wish.heat, cap=wish.cap, ends=(5,), barred=60)
    packed, uniform = cpu.pack(table), torch.rand(60, generator=generator)
    plain = cpu.vocabulary(hidden, packed, wish, uniform=uniform)
    hints = (plain.found.argmax, torch.randint(0, 6000, (60,), generator=generator), torch.full((60,), 5))
    for hint in (*hints, torch.full((60,), -1)):
        other = cpu.vocabulary(hidden, packed, wish, uniform=uniform, hint=hint)
        assert torch.equal(other.found.argmax, plain.found.argmax)
        assert torch.equal(other.found.sampled, plain.found.sampled)
        assert torch.allclose(other.found.entropies, plain.found.entropies, atol=1e-5)


def test_positions_do_not_depend_on_each_other(isa: str) -> None:
    """A position alone, among others, and on any number of threads: the same bits."""
    generator = torch.Generator().manual_seed(9)
    hidden, table, wish = sure(generator)
    packed, uniform = cpu.pack(table), torch.rand(60, generator=generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu.vocabulary(hidden, packed, wish, uniform=uniform)
        torch.set_num_threads(3)
        whole = cpu.vocabulary(hidden, packed, wish, uniform=uniform)
    finally:
        torch.set_num_threads(before)
    assert alone.soft is not None and whole.soft is not None
    assert torch.equal(alone.soft, whole.soft)
    assert all(torch.equal(a, b) for a, b in zip(alone.found, whole.found, strict=True))
    for row in (0, 7, 59):
        one = slice(row, row + 1)
        own = cpu.vocabulary(hidden[one], packed, wish, uniform=uniform[one])
        assert own.soft is not None and torch.equal(own.soft, whole.soft[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(own.found, whole.found, strict=True))


def test_scores_that_are_no_numbers(isa: str) -> None:
    """Such a position has no entropy and no blend; the others are as they were."""
    generator = torch.Generator().manual_seed(10)
    hidden, table, wish = sure(generator)
    uniform = torch.rand(60, generator=generator)
    packed = cpu.pack(table)
    sound = cpu.vocabulary(hidden, packed, wish, uniform=uniform)
    hidden[3, 2] = float("nan")
    other = cpu.vocabulary(hidden, packed, wish, uniform=uniform, hint=torch.zeros(60, dtype=torch.int64))
    assert other.found.entropies[3].isnan() and other.soft is not None and other.soft[3].isnan().all()
    rest = torch.arange(60) != 3
    assert torch.equal(other.found.sampled[rest], sound.found.sampled[rest])
    scores = torch.randn(3, 100, generator=generator)
    scores[1, 50] = float("inf")
    found, weights, _ = cpu.read(scores.clone(), cpu.Wish(heat=1.0), torch.rand(3, generator=generator))
    assert found.entropies.isnan().tolist() == [False, True, False] and not weights[1].any()
    twin = reference.read(scores, cpu.Wish(heat=1.0), None)[0]
    assert twin.entropies.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_floats(isa: str, dtype: torch.dtype) -> None:
    """Done some positions at a time: the same words as the whole at once, and slabs that do not count left out."""
    generator = torch.Generator().manual_seed(11)
    hidden, quantized, wish = sure(generator)
    hidden, quantized = (
        hidden.repeat(3, 1).to(dtype),
        Quantized(bits=8, group=None, data=quantized.data.repeat(3, 1), scales=quantized.scales.repeat(3, 1)),
    )
    table = quantized.dequantize()
    table += torch.randn(table.shape, generator=generator) * 0.01
    table = table.to(dtype)
    uniform = torch.rand(len(hidden), generator=generator)
    found, soft, share = cpu.vocabulary(hidden, table, wish, uniform=uniform)
    processed = wish.process(torch.nn.functional.linear(hidden, table).float())
    probabilities, entropies = truth_of(processed)
    if dtype == torch.float32:
        assert torch.equal(found.argmax, processed.argmax(dim=-1))
    assert torch.allclose(found.entropies.double(), entropies, atol=1e-4)
    check_samples(found, probabilities, uniform, 1e-4)
    assert soft is not None and share <= 1
    bound = 1e-5 if dtype == torch.float32 else 0.01 * float(table.abs().max())
    assert (soft.double() - probabilities @ table.double()).abs().max() < bound


def test_grouped_tables_go_the_other_way(isa: str) -> None:
    """A table with groups or in 4 bits is no table of the fused step, and gives what it should all the same."""
    generator = torch.Generator().manual_seed(12)
    hidden = torch.randn(70, 64, generator=generator)
    for bits in (4, 8):
        table = random_weight((300, 64), bits, 32, generator)
        found, soft, _ = cpu.vocabulary(hidden, cpu.pack(table), cpu.Wish(heat=0.7, cap=30.0))
        processed = cpu.Wish(heat=0.7, cap=30.0).process(reference.linear(hidden, table))
        probabilities, entropies = truth_of(processed)
        assert torch.allclose(found.entropies.double(), entropies, atol=1e-4)
        assert soft is not None
        assert (soft.double() - probabilities @ table.dequantize().double()).abs().max() < 1e-3
