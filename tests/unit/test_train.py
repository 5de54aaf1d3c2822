"""Training: the objective equals what inference computes, nothing leaks, runs resume exactly."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.errors import CheckpointError, ConfigError
from dgemma.model import Network
from dgemma.train import head, objective, recipes
from dgemma.train.data import Batch, Batching, Sample, collate, pools
from dgemma.train.loop import Progress, Schedule, Trainer
from dgemma.train.objective import CanvasView, Objective, SequenceView
from dgemma.train.optimizer import orthogonalize
from dgemma.train.run import Run, train

VOCABULARY, END, PAD = 64, 3, 0


def small_network(seed: int = 0, window: int = 6) -> Network:
    text = {
        **recipes.DEMO_CONFIG["text_config"],
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "sliding_window": window,
        "head_dim": 8,
        "global_head_dim": 16,
    }
    network = Network(ModelConfig.from_dict({**recipes.DEMO_CONFIG, "text_config": text}))
    recipes.initialize(network, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim == 1:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
    return network


def draw(rng: random.Random, pool: int = 0) -> Sample:
    prompt = [rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(3, 12))]
    return Sample(prompt, [rng.randrange(4, VOCABULARY) for _ in range(rng.randrange(1, 20))] + [END])


def canvases(canvas: torch.Tensor, answer: int) -> Batch:
    """A batch of these canvases, of which the first `answer` positions are no fill."""
    none = torch.zeros(0, dtype=torch.int64)
    filled = (torch.arange(canvas.shape[1]) >= answer).expand(canvas.shape)
    return Batch(none, none, none, none, none, canvas, filled, none)


def make_batch(seed: int = 0, count: int = 5, length: int = 8, per_sample: int = 2) -> tuple[list[Sample], Batch]:
    rng = random.Random(seed)
    samples = [draw(rng) for _ in range(count)]
    batching = Batching(positions=1, canvas_lengths={length: 1.0}, per_sample=per_sample)
    return samples, collate(samples, length, batching, END, PAD, rng)


def test_collate_takes_canvases_of_the_response_and_fills_the_last() -> None:
    samples, batch = make_batch()
    for row, (owner, start) in enumerate(zip(batch.owner.tolist(), batch.start.tolist(), strict=True)):
        sample = samples[owner]
        clean = (sample.prompt + sample.response)[start : start + 8]
        assert (start - len(sample.prompt)) % 8 == 0
        assert batch.canvas[row].tolist() == clean + [END] * (8 - len(clean))
        assert batch.filled[row].tolist() == [False] * len(clean) + [True] * (8 - len(clean))
    pairs = list(zip(batch.owner.tolist(), batch.start.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def test_training_views_see_what_inference_sees() -> None:
    """Logits of a training forward equal those of encode and denoise, canvas by canvas."""
    network = small_network()
    samples, batch = make_batch()
    noisy = torch.randint(0, VOCABULARY, batch.canvas.shape, generator=torch.Generator().manual_seed(1))
    soft = torch.randn(*noisy.shape, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        sequences = SequenceView(batch, network.config.sliding_window)
        hidden = network.run(network.embed(batch.tokens), sequences)
        view = CanvasView(sequences, batch.owner, batch.start, 8, network.config.sliding_window)
        got = network.logits(network.run(network.self_conditioning.condition(network.embed(noisy), soft), view))
        for row, (owner, start) in enumerate(zip(batch.owner.tolist(), batch.start.tolist(), strict=True)):
            cache = network.new_cache()
            clean = torch.tensor([samples[owner].prompt + samples[owner].response])
            encoded = network.encode(clean[:, :start], cache)
            torch.testing.assert_close(hidden[owner, :start], encoded[0], atol=1e-4, rtol=0)
            wanted = network.denoise(noisy[row : row + 1], cache, soft[row : row + 1])
            torch.testing.assert_close(got[row], wanted[0], atol=1e-4, rtol=0)


def test_a_canvas_never_sees_its_own_place_or_later_ones() -> None:
    """Changing clean tokens from a canvas's start on changes nothing that the canvas predicts; before it does."""
    network = small_network()
    _, batch = make_batch(seed=3)
    settings = Objective(self_conditioning=0.0, autoregressive=0.0)

    def denoise_loss(tokens: Tensor) -> float:
        one = replace(batch, tokens=tokens)
        return objective.compute(network, one, settings, torch.Generator().manual_seed(0)).denoise.item()

    later, earlier = batch.tokens.clone(), batch.tokens.clone()
    for row in range(len(later)):
        starts = batch.start[batch.owner == row]
        later[row, int(starts.max()) :] = 5
        earlier[row, 0] = (earlier[row, 0] + 1) % VOCABULARY
    only_last = torch.stack(
        [(batch.start[batch.owner == o]).max() == s for o, s in zip(batch.owner, batch.start, strict=True)]
    )
    batch = Batch(
        **{
            name: value[only_last] if name in ("owner", "start", "canvas", "filled", "open") else value
            for name, value in vars(batch).items()
        }
    )
    assert denoise_loss(later) == pytest.approx(denoise_loss(batch.tokens), abs=1e-6)
    assert abs(denoise_loss(earlier) - denoise_loss(batch.tokens)) > 1e-4


def test_gradients_flow_from_the_denoiser_into_the_encoder() -> None:
    """The encoder's own scalars get a gradient from the denoising loss alone."""
    network = small_network()
    _, batch = make_batch()
    losses = objective.compute(network, batch, Objective(autoregressive=0.0), torch.Generator().manual_seed(0))
    losses.total.backward()
    assert network.layers[0].encode_scalar.grad is not None
    assert network.layers[0].encode_scalar.grad.abs().item() > 0


def test_noise_keeps_each_token_with_probability_one_minus_t() -> None:
    """Over uniform t half of the tokens stay (plus those that noise hits by chance), in canvases of every level."""
    canvas = torch.full((4000, 16), 7)
    noisy = objective.add_noise(canvases(canvas, 16), VOCABULARY, Objective(), torch.Generator().manual_seed(0))
    kept = (noisy == canvas).float()
    assert kept.mean().item() == pytest.approx(0.5 + 0.5 / VOCABULARY, abs=0.01)
    assert kept.mean(dim=1).quantile(0.1).item() < 0.2 and kept.mean(dim=1).quantile(0.9).item() > 0.8
    replaced = noisy[noisy != canvas]
    assert len(replaced.unique()) == VOCABULARY - 1


def test_ordered_noise_begins_at_a_uniform_place_of_the_answer() -> None:
    """Of 10 answer positions position p is noise in (p + 1) / 10 of the canvases, the fill always."""
    canvas = torch.full((20_000, 16), 7)
    settings = Objective(ordered=1.0)
    noisy = objective.add_noise(canvases(canvas, 10), VOCABULARY, settings, torch.Generator().manual_seed(0))
    changed = (noisy != canvas).float().mean(dim=0) * VOCABULARY / (VOCABULARY - 1)
    wanted = torch.arange(1, 17).clamp_max(10) / 10
    assert torch.allclose(changed, wanted, atol=0.015)
    clean = (noisy == canvas).float()[:, :3]
    assert (
        clean[:, 0] >= clean[:, 2]
    ).float().mean().item() > 0.99  # what is clean comes first (noise may hit by chance)


def test_a_sampler_step_keeps_what_is_sure_and_draws_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of one possible word, of two that are as likely, and of all: the first stay, the others are noise when
    the bound is met before them; the soft embedding is the mean of the words.
    """
    network, length = small_network(), 12
    scores = torch.full((2000, length, VOCABULARY), 0.0)
    scores[:, :4, 9] = 40.0
    scores[:, 4:6, 10:12] = 40.0
    monkeypatch.setattr(network, "logits", lambda hidden: scores.clone())
    hidden = torch.zeros(2000, length, 32)
    canvas, soft = objective.sampler_step(network, hidden, torch.Generator().manual_seed(0))
    assert (canvas[:, :4] == 9).all()
    # Of the two, one is always within the bound, since the sum leaves out the largest, and the other from 0.69 nats on.
    pair = ((canvas[:, 4:6] == 10) | (canvas[:, 4:6] == 11)).float().mean().item()
    beyond = 1 - torch.tensor(0.6931 / 0.1).log().item() / torch.tensor(20.0).log().item()
    chance = 2 / VOCABULARY
    assert pair == pytest.approx((1 + beyond + (1 - beyond) * chance) / 2, abs=0.02)
    assert len(canvas[:, 6:].unique()) == VOCABULARY
    table = network.embed_tokens.weight.detach() * 32**0.5
    for place, words in ((0, [9]), (4, [10, 11]), (7, list(range(VOCABULARY)))):
        assert torch.allclose(soft[0, place], table[words].mean(dim=0), atol=1e-5)


def test_tiled_cross_entropy_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 12, generator=generator, requires_grad=True)
    table = torch.randn(40, 12, generator=generator, requires_grad=True)
    targets = torch.randint(0, 40, (23,), generator=generator)
    weights = torch.rand(23, generator=generator)
    total, hits = head.cross_entropy(hidden, table, targets, weights, 5.0)
    (3 * total).backward()
    got = hidden.grad, table.grad
    hidden.grad = table.grad = None
    scores = 5.0 * torch.tanh(hidden @ table.T / 5.0)
    wanted = (F.cross_entropy(scores, targets, reduction="none") * weights).sum()
    (3 * wanted).backward()
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(got, (hidden.grad, table.grad))
    assert hits.tolist() == (scores.argmax(dim=-1) == targets).tolist()


@pytest.mark.parametrize("shape", [(8, 8), (16, 5), (3, 4, 20), (3, 20, 4)])
def test_orthogonalize_moves_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.5 and values.max() < 1.5


def test_pools_resume_at_any_batch_and_share_between_processes() -> None:
    settings = Batching(positions=300, canvas_lengths={8: 0.5, 16: 0.5}, pool=40)

    def take(count: int, **where: object) -> list[tuple[int, int, Batch]]:
        stream = pools(draw, lambda _: settings, end=END, pad=PAD, seed=5, **where)  # type: ignore[arg-type]
        return [next(stream) for _ in range(count)]

    def same(one: tuple[int, int, Batch], other: tuple[int, int, Batch]) -> bool:
        return one[:2] == other[:2] and all(map(torch.equal, vars(one[2]).values(), vars(other[2]).values()))

    whole = take(12)
    pool, number, _ = whole[6]
    assert same(take(1, pool=pool, skip=number)[0], whole[6])
    halves = take(3, share=(0, 2)), take(3, share=(1, 2))
    assert [tuple(b.tokens.shape) for pair in zip(*halves, strict=True) for _, _, b in pair] == [
        tuple(b.tokens.shape) for _, _, b in whole[:6]
    ]


def make_trainer(directory: Path, updates: int) -> Trainer:
    return Trainer(
        small_network(),
        draw=draw,
        batching=lambda _: Batching(positions=300, canvas_lengths={8: 1.0}, pool=40),
        objective=Objective(balance=0.01),
        schedule=Schedule(updates=updates, warmup=3),
        end=END,
        pad=PAD,
        seed=1,
        directory=directory,
    )


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", 9)
    seen: list[Progress] = []
    assert whole.run(seen.append)
    assert seen[-1].update == 9

    first = make_trainer(tmp_path / "parts", 9)

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.update == 4:
            first.save()
            raise Stop

    with pytest.raises(Stop):
        first.run(stop)
    second = make_trainer(tmp_path / "parts", 9)
    second.resume()
    assert second.update == 4
    assert second.run(lambda _: None)
    for name, weight in whole.average.items():
        torch.testing.assert_close(second.average[name], weight)
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in log] == list(range(1, 10))


def test_a_new_run_can_start_from_trained_weights(tmp_path: Path) -> None:
    trained, fresh = small_network(seed=7), make_trainer(tmp_path, 5)
    fresh.start_from(trained.state_dict())
    for name, weight in trained.named_parameters():
        torch.testing.assert_close(dict(fresh.network.named_parameters())[name], weight)
        torch.testing.assert_close(fresh.average[name], weight.detach())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 60)
    seen: list[Progress] = []
    trainer.run(seen.append)
    assert sum(p.denoise for p in seen[-10:]) < 0.95 * sum(p.denoise for p in seen[:10])


def test_resuming_nothing_or_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        make_trainer(tmp_path, 5).resume()
    make_trainer(tmp_path, 5).save()
    other = make_trainer(tmp_path, 5)
    other.seed = 2
    with pytest.raises(CheckpointError, match="seed 1, not 2"):
        other.resume()


def test_the_schedule_is_a_trapezoid() -> None:
    schedule = Schedule(updates=100, warmup=10, cooldown=0.4)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(30) == 1.0
    assert schedule.rate(80) == pytest.approx(0.5)
    assert schedule.rate(99) == pytest.approx(1 / 40)


def test_a_run_is_checked_before_anything_is_built(tmp_path: Path) -> None:
    run = Run(recipe="nothing", directory=tmp_path, updates=1, seed=0)
    with pytest.raises(ConfigError, match="recipe: 'nothing' is unknown"):
        train(run, lambda _: None)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(replace(run, recipe="demo", resume=True), lambda _: None)
    (tmp_path / "state.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(replace(run, recipe="demo"), lambda _: None)


def test_processes_that_average_gradients_stay_in_step(tmp_path: Path) -> None:
    """Two processes train the demo recipe for an update; the exported model loads."""
    import dgemma

    run = Run(recipe="demo", directory=tmp_path / "run", updates=1, seed=0, processes=2, compiled=False)
    assert train(run, lambda _: None)
    model = dgemma.load(tmp_path / "run" / "model")
    assert model.generate("hello", dgemma.SamplingParams(max_new_tokens=4, max_denoising_steps=1)).stats.new_tokens <= 4
