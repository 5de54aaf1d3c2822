"""The sampler's formulas against brute force and transformers' classes; random numbers; a request's wishes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from dgemma.diffusion import JAX, TRANSFORMERS, CounterDraws, GlobalDraws, generate
from dgemma.diffusion.policy import Stability
from dgemma.diffusion.sampling import accept, after_end, entropy, keep_likely, temperature
from dgemma.errors import RequestError
from dgemma.kernels.wish import Wish
from dgemma.params import GenerationConfig, SamplingParams
from tiny import SPECS, Lab, prompt

settings.register_profile("parity", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("parity")

NEVER = float("-inf")
seeds = st.integers(0, 2**31)


def scores(seed: int, *shape: int, scale: float = 4.0) -> Tensor:
    """Random logits, peaked for some positions and flat for others."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(*shape[:-1], 1, generator=generator) * scale
    return torch.randn(*shape, generator=generator) * sharpness


# --- temperature -----------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 64), data=st.data(), low=st.floats(0, 3, width=32), more=st.floats(0.015625, 3, width=32))
def test_temperature(steps: int, data: Any, low: float, more: float) -> None:
    """Bit for bit transformers' quotients, from t_max downwards in equal strides."""
    step = data.draw(st.integers(1, steps))
    logits = scores(step, 2, 3, 7)
    theirs = LinearTemperatureScheduleLogitsProcessor(low, low + more, steps)(
        torch.zeros(2, 1), logits, cur_step=torch.tensor(step, dtype=torch.int32)
    )
    heat = temperature(step, steps, low, low + more)
    assert torch.equal(logits / heat, theirs)
    assert math.isclose(float(heat), low + more * step / steps, rel_tol=1e-5, abs_tol=1e-6)
    assert math.isclose(float(temperature(steps, steps, low, low + more)), low + more, rel_tol=1e-6)


# --- entropy ---------------------------------------------------------------------------------------------------------


@given(seed=seeds, vocabulary=st.integers(1, 90), shift=st.floats(-50, 50), banned=st.integers(0, 5))
def test_entropy(seed: int, vocabulary: int, shift: float, banned: int) -> None:
    """Minus the sum of p log p in nats, between 0 and log V; words that cannot be do not count."""
    processed = scores(seed, 2, 5, vocabulary, scale=30.0)
    if banned < vocabulary:
        processed[..., :banned] = NEVER
    p = np.exp(processed.double().numpy() - np.logaddexp.reduce(processed.double().numpy(), axis=-1, keepdims=True))
    brute = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
    ours = entropy(processed)
    assert ours.shape == (2, 5)
    np.testing.assert_allclose(ours.numpy(), brute, atol=3e-5)
    assert (ours >= -1e-5).all() and (ours <= math.log(vocabulary) + 1e-4).all()
    np.testing.assert_allclose(entropy(processed + shift).numpy(), brute, atol=3e-4)
    assert torch.equal(ours, torch.distributions.Categorical(logits=processed).entropy())


def test_entropy_extremes() -> None:
    """Certain is 0, uniform is log V, also far out on the scale."""
    certain = torch.zeros(1, 50)
    certain[0, 3] = 1e6
    assert entropy(certain).item() == 0.0
    assert entropy(torch.full((1, 262_144), -1e4)).item() == pytest.approx(math.log(262_144), abs=1e-3)


# --- accept ----------------------------------------------------------------------------------------------------------

# Multiples of 1/64 add up exactly in float32, so that brute force and tensors cannot differ by rounding.
exact = st.integers(0, 300).map(lambda n: n / 64)


def brute_accept(entropies: list[float], bound: float) -> int:
    """How many positions: the most for which the sum of the lowest, the largest of them left out, is in the bound."""
    rising = sorted(entropies)
    return max(k for k in range(1, len(rising) + 1) if sum(rising[:k]) - rising[k - 1] <= bound)


@given(rows=st.lists(st.lists(exact, min_size=6, max_size=6), min_size=1, max_size=3), bound=exact)
def test_accept_brute_force(rows: list[list[float]], bound: float) -> None:
    """The k lowest, row by row; never none; what is left out is no lower than what is in."""
    mask = accept(torch.tensor(rows), bound)
    assert mask.dtype == torch.bool
    for row, taken in zip(rows, mask.tolist(), strict=True):
        assert sum(taken) == brute_accept(row, bound) >= 1
        inside = [h for h, t in zip(row, taken, strict=True) if t]
        outside = [h for h, t in zip(row, taken, strict=True) if not t]
        assert not outside or max(inside) <= min(outside)


@given(seed=seeds, length=st.integers(1, 40), bound=st.floats(1e-3, 40.0))
def test_accept_equals_transformers(seed: int, length: int, bound: float) -> None:
    """The same positions as `EntropyBoundSampler`, from the same logits; the accepted ones take the sample."""
    processed = scores(seed, 3, length, 30, scale=12.0)
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=bound), length, 30, 8)
    before, sampled = torch.full((3, length), -1), torch.full((3, length), 1)
    theirs = sampler.accept_canvas(before, sampled, processed, 3)
    mask = accept(entropy(processed), bound)
    assert torch.equal(mask, sampler.accepted_token_mask)
    assert torch.equal(torch.where(mask, sampled, before), theirs)


@given(seed=seeds, order=st.permutations(range(7)))
def test_accept_follows_positions(seed: int, order: list[int]) -> None:
    """Positions exchanged, acceptance exchanged; a wider bound never accepts less."""
    entropies = torch.rand(1, 7, generator=torch.Generator().manual_seed(seed)) * 2
    assert torch.equal(accept(entropies, 1.0)[:, order], accept(entropies[:, order], 1.0))
    assert (accept(entropies, 0.5) <= accept(entropies, 1.5)).all()


# --- top-k, top-p, refused tokens, end tokens ------------------------------------------------------------------------


@given(seed=seeds, top_k=st.integers(1, 25), top_p=st.floats(0.05, 1.0))
def test_keep_likely(seed: int, top_k: int, top_p: float) -> None:
    """The k likeliest words, of those the fewest that reach the mass; their scores stay, the rest is impossible."""
    processed = scores(seed, 2, 3, 20)
    kept = keep_likely(processed, top_k, top_p)
    for old, new in zip(processed.flatten(0, 1).double(), kept.flatten(0, 1).double(), strict=True):
        falling = old.argsort(descending=True)[:top_k]
        p = torch.softmax(old[falling], dim=-1)
        before = torch.cumsum(p, dim=-1) - p
        close = (before - top_p).abs() < 1e-5  # there rounding may decide either way
        expected = set(falling[before < top_p].tolist())
        got = set(torch.isfinite(new).nonzero().flatten().tolist())
        assert got ^ expected <= set(falling[close].tolist())
        assert int(old.argmax()) in got
        assert all(new[word] == old[word] for word in got)


def test_keep_likely_unset_changes_nothing() -> None:
    """1.0 and None leave all words in, bit for bit."""
    processed = scores(1, 2, 3, 20)
    assert torch.equal(keep_likely(processed, None, 1.0), processed)
    assert torch.equal(keep_likely(processed, 20, 1.0), processed)


@pytest.mark.parametrize("barred", [0, 3, 5])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_wish(barred: int, cap: float | None) -> None:
    """Capped, biased, tempered, refused, in this order: word by word, in a copy."""
    raw = scores(2, 2, 5, 9)
    saved = raw.clone()
    found = Wish(heat=0.7, cap=cap, bias=((4, 1.5), (8, -2.0)), ends=(1, 8), barred=barred).process(raw)
    assert torch.equal(raw, saved)
    for row, place, word in itertools.product(range(2), range(5), range(9)):
        score = saved[row, place, word].item()
        score = cap * math.tanh(score / cap) if cap else score
        expected = (score + {4: 1.5, 8: -2.0}.get(word, 0.0)) / 0.7
        expected = NEVER if place < barred and word in (1, 8) else expected
        assert found[row, place, word].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(rows=st.lists(st.lists(st.integers(0, 5), min_size=5, max_size=5), min_size=1, max_size=4))
def test_after_end(rows: list[list[int]]) -> None:
    """All behind the first of the end tokens, the end token itself not."""
    mask = after_end(torch.tensor(rows), torch.tensor([2, 4])).tolist()
    for row, behind in zip(rows, mask, strict=True):
        first = min((place for place, token in enumerate(row) if token in (2, 4)), default=len(row))
        assert behind == [place > first for place in range(len(row))]


# --- stopping --------------------------------------------------------------------------------------------------------


@given(
    threshold=st.integers(0, 3),
    confidence=st.floats(0.01, 1.2),
    steps=st.lists(st.tuples(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=3, max_size=3), seeds), max_size=9),
)
def test_stop_equals_transformers(threshold: int, confidence: float, steps: list[tuple[list[int], int]]) -> None:
    """Step by step, three rows at once, the verdict of `StableAndConfidentStoppingCriteria`."""
    theirs = StableAndConfidentStoppingCriteria(threshold, confidence)
    ours = Stability(TRANSFORMERS, threshold, torch.zeros(3, 2, dtype=torch.int64))
    for tokens, seed in steps:
        argmax = torch.tensor(tokens)[:, None].expand(3, 2).contiguous()
        processed = scores(seed, 3, 2, 6, scale=12.0)
        stable = ours.update(argmax, torch.full_like(argmax, 9))
        confident = TRANSFORMERS.confident(entropy(processed).mean(dim=-1), confidence)
        assert torch.equal(stable & confident, theirs(argmax, processed))


@given(
    threshold=st.integers(0, 3),
    steps=st.lists(st.tuples(*[st.lists(st.integers(0, 1), min_size=2, max_size=2)] * 2), min_size=1, max_size=8),
)
def test_official_stability(threshold: int, steps: list[tuple[list[int], list[int]]]) -> None:
    """There the argmax is compared with the canvases that went into the last steps, the starting noise included."""
    start = [0, 1]
    stability = Stability(JAX, threshold, torch.tensor([start]))
    went_in = [start]
    for argmax, canvas in steps:
        expected = len(went_in) >= threshold and all(
            earlier == argmax for earlier in went_in[len(went_in) - threshold :]
        )
        assert stability.update(torch.tensor([argmax]), torch.tensor([canvas])).item() == expected
        went_in.append(canvas)


def test_confidence_at_the_threshold() -> None:
    """transformers stops below the threshold, the official sampler also at it."""
    entropies = torch.tensor([0.25, 0.5, 0.75])
    assert TRANSFORMERS.confident(entropies, 0.5).tolist() == [True, False, False]
    assert JAX.confident(entropies, 0.5).tolist() == [True, True, False]


def test_commit() -> None:
    """transformers commits the argmax, the official sampler the canvas after the step."""
    argmax, canvas = torch.tensor([[1, 2]]), torch.tensor([[3, 4]])
    assert TRANSFORMERS.commit(argmax, canvas).tolist() == [[1, 2]]
    assert JAX.commit(argmax, canvas).tolist() == [[3, 4]]


# --- random numbers --------------------------------------------------------------------------------------------------


def test_global_draws_in_the_reference_order() -> None:
    """torch's generator is asked as transformers asks it: randint, then multinomial and randint a step."""
    processed = scores(4, 2, 5, 11)
    torch.manual_seed(5)
    sampler = EntropyBoundSampler(EntropyBoundSamplerConfig(entropy_bound=0.1), 5, 11, 8)
    start = sampler.initialize_canvas(2, torch.device("cpu"))
    sample = torch.multinomial(torch.softmax(processed, dim=-1).view(-1, 11), num_samples=1).view(2, 5)
    noise = sampler.initialize_canvas(2, torch.device("cpu"))
    torch.manual_seed(5)
    draws = GlobalDraws()
    assert torch.equal(draws.start(0, 2, 5, 11), start)
    assert torch.equal(draws.sample(0, 1, processed), sample)
    assert torch.equal(draws.renoise(0, 1, 2, 5, 11), noise)


@given(ours=st.integers(-(2**63), 2**64 - 1), others=st.lists(seeds, max_size=3), canvas=st.integers(0, 900))
def test_counter_draws_are_functions_of_the_request(ours: int, others: list[int], canvas: int) -> None:
    """A row's numbers do not depend on its company, its place, earlier draws or the canvas's length."""
    processed = scores(canvas, 1, 12, 30)
    alone, among = CounterDraws([ours]), CounterDraws([*others, ours])
    batch = len(others) + 1
    among.renoise(3, 1, batch, 12, 30)  # an earlier draw
    assert torch.equal(among.start(canvas, batch, 12, 30)[-1], alone.start(canvas, 1, 12, 30)[0])
    assert torch.equal(among.renoise(canvas, 2, batch, 12, 30)[-1], alone.renoise(canvas, 2, 1, 12, 30)[0])
    together = torch.cat([scores(7, len(others), 12, 30), processed]) if others else processed
    assert torch.equal(among.sample(canvas, 2, together)[-1], alone.sample(canvas, 2, processed)[0])
    assert torch.equal(alone.renoise(canvas, 2, 1, 5, 30), alone.renoise(canvas, 2, 1, 12, 30)[:, :5])


def test_counter_draws_differ_where_they_should() -> None:
    """Seed, canvas, step and purpose each give other numbers; long canvases do not run into the next counter."""
    length, seen = 256, {}
    for seed, canvas, step in itertools.product((0, 1, 2**40, -5), (0, 1, 2), (0, 1, 47)):
        for purpose in (CounterDraws.NOISE, CounterDraws.SAMPLE):
            numbers = CounterDraws([seed]).uniform(canvas, step, purpose, length)[0]
            for number in numbers.tolist():
                assert number not in seen, f"{(seed, canvas, step, purpose)} repeats {seen[number]}"
                seen[number] = (seed, canvas, step, purpose)


def test_counter_draws_have_the_right_distribution() -> None:
    """Noise is uniform over the vocabulary and samples follow the softmax (chi-squared, fixed seeds)."""
    rows, length, words = 20, 500, 12
    draws = CounterDraws(list(range(rows)))
    count = rows * length
    noise = torch.bincount(draws.renoise(0, 1, rows, length, words).flatten(), minlength=words)
    assert ((noise - count / words) ** 2 / (count / words)).sum() < 31.3  # 99.9 % of 11 degrees of freedom
    processed = torch.linspace(-2, 2, words).expand(rows, length, words)
    expected = torch.softmax(processed[0, 0], dim=-1) * count
    samples = torch.bincount(draws.sample(0, 1, processed).flatten(), minlength=words)
    assert ((samples - expected) ** 2 / expected).sum() < 31.3


@pytest.mark.parametrize("target", [0.0, 1e-300, 0.5, 1 - 2**-25, 1 - 2**-53])
def test_counter_draws_never_take_the_impossible(monkeypatch: pytest.MonkeyPatch, target: float) -> None:
    """At either end of [0, 1) too, a sample is a word that has a probability: refused end tokens stay refused."""
    monkeypatch.setattr(CounterDraws, "uniform", lambda self, *_: torch.full((1, 4), target, dtype=torch.float64))
    processed = scores(6, 1, 4, 40)
    processed[..., :3] = processed[..., -3:] = NEVER
    taken = CounterDraws([0]).sample(0, 1, processed)
    assert torch.isfinite(processed.gather(-1, taken[..., None])).all()


def test_counter_draws_generate_alone_and_in_a_batch(lab: Lab) -> None:
    """A request's answer does not depend on its company."""
    spec, network = SPECS["short_window"], lab.network("short_window")
    own = GenerationConfig(
        max_new_tokens=20,
        max_denoising_steps=9,
        entropy_bound=1.0,
        confidence_threshold=0.5,
        eos_token_ids=(4, 9, 14, 22, 31),
        pad_token_id=0,
    )
    tokens = prompt(spec, 3, 9)
    together = generate(network, tokens, defaults=own, draws=CounterDraws([11, 12, 13]))
    widths = set()
    for row in range(3):
        alone = generate(network, tokens[row : row + 1], defaults=own, draws=CounterDraws([11 + row]))
        # Alone, the loop ends with the row itself; among others padding may follow.
        width = alone.sequences.shape[1]
        widths.add(width)
        assert torch.equal(together.sequences[row, :width], alone.sequences[0])
        assert torch.equal(together.sequences[row, width:], torch.zeros(together.sequences.shape[1] - width).long())
        assert together.denoising_steps[row] == alone.denoising_steps[0]
    assert widths == {9 + 10, 9 + 20}, "one row was to end before the others"


# --- what a request may ask of the loop beyond the references --------------------------------------------------------


def test_greedy_samples_the_argmax(lab: Lab) -> None:
    """Temperature 0 takes the likeliest word at every accepted position."""
    from dgemma.diffusion import settle

    spec, network = SPECS["base"], lab.network("base")
    cache = network.new_cache(batch=2)
    network.encode(prompt(spec, 2, 9), cache)
    params = SamplingParams(temperature=0, max_denoising_steps=5, entropy_bound=3.0)
    own = params.resolve(GenerationConfig())
    torch.manual_seed(0)
    for step in settle(network, cache, params, own, length=spec.canvas):
        assert torch.equal(step.canvas[step.accepted], step.argmax[step.accepted])
        assert step.accepted.any(dim=-1).all()


def test_min_tokens_and_stop_ids(lab: Lab) -> None:
    """No end token before `min_tokens`; a request's own stop ids end it as the checkpoint's do."""
    spec, network = SPECS["base"], lab.network("base")
    tokens = prompt(spec, 3, 9)
    ends = tuple(range(3, 30))
    own = GenerationConfig(max_new_tokens=32, max_denoising_steps=5, eos_token_ids=ends)
    torch.manual_seed(1)
    plain = generate(network, tokens, defaults=own).sequences[:, 9:]
    torch.manual_seed(1)
    stops = generate(
        network,
        tokens,
        SamplingParams(stop_token_ids=ends),
        defaults=GenerationConfig(max_new_tokens=32, max_denoising_steps=5, eos_token_ids=()),
    ).sequences[:, 9:]
    assert torch.equal(plain, stops)
    first = torch.isin(plain, torch.tensor(ends)).int().argmax(dim=-1)
    assert (first < 12).all(), "without min_tokens these end early"
    torch.manual_seed(1)
    late = generate(network, tokens, SamplingParams(min_tokens=20), defaults=own).sequences[:, 9:]
    assert not torch.isin(late[:, :20], torch.tensor(ends)).any()
    assert torch.isin(late[:, 20:], torch.tensor(ends)).any(dim=-1).all()


def test_shorter_canvas(lab: Lab) -> None:
    """A canvas below the checkpoint's own; one above it is refused by name."""
    spec, network = SPECS["base"], lab.network("base")
    own = GenerationConfig(max_new_tokens=12, max_denoising_steps=4, eos_token_ids=())
    out = generate(network, prompt(spec, 2, 5), SamplingParams(canvas_length=5), defaults=own)
    assert out.sequences.shape == (2, 5 + 15)
    with pytest.raises(RequestError, match="canvas_length"):
        generate(network, prompt(spec, 2, 5), SamplingParams(canvas_length=17), defaults=own)


def test_bad_prompts_and_broken_weights(lab: Lab) -> None:
    """Empty prompts, ids outside the vocabulary and NaN raise; none of them turns into padding."""
    import copy

    spec, network = SPECS["one_layer"], lab.network("one_layer")
    own = GenerationConfig(max_new_tokens=8, max_denoising_steps=2)
    for bad in (torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[spec.vocab]]), torch.tensor([[-1]])):
        with pytest.raises(RequestError, match="prompt"):
            generate(network, bad, defaults=own)
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken.embed_tokens.weight[5] = float("nan")
    with pytest.raises(RequestError, match="not numbers"):
        generate(broken, prompt(spec, 1, 4), defaults=own)
