"""The official sampler's rules: its loop in plain numpy against ours with its policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgemma.diffusion import JAX, TRANSFORMERS, generate
from dgemma.params import GenerationConfig
from tiny import SPECS, Lab, prompt

# --- the official sampler's loop, in plain numpy ---------------------------------------------------------------------


class Noise:
    """Random arrays that are functions of (canvas, step): for the loop under test and for numpy alike."""

    def __init__(self, seed: int, rows: int, length: int, vocabulary: int):
        self.seed, self.shape, self.vocabulary = seed, (rows, length), vocabulary

    def uniform_tokens(self, canvas: int, step: int) -> np.ndarray:
        """[B, L]."""
        return np.random.default_rng([self.seed, canvas, step, 0]).integers(0, self.vocabulary, self.shape)

    def gumbel(self, canvas: int, step: int) -> np.ndarray:
        """[B, L, V]: the argmax of scores plus this is one sample of their softmax."""
        generator = np.random.default_rng([self.seed, canvas, step, 1])
        return generator.gumbel(size=(*self.shape, self.vocabulary)).astype(np.float32)

    # dgemma's `Draws`
    def start(self, canvas: int, rows: int, length: int, vocabulary: int) -> Tensor:
        return torch.from_numpy(self.uniform_tokens(canvas, 0))

    def sample(self, canvas: int, step: int, processed: Tensor) -> Tensor:
        return torch.from_numpy((processed.numpy() + self.gumbel(canvas, step)).argmax(axis=-1))

    def renoise(self, canvas: int, step: int, rows: int, length: int, vocabulary: int) -> Tensor:
        return torch.from_numpy(self.uniform_tokens(canvas, step))


def official_canvas(network: Any, cache: Any, noise: Noise, index: int, own: GenerationConfig) -> tuple[Any, Any]:
    """One canvas by the official sampler's rules: (committed tokens [B, L], steps of each row [B])."""
    canvas = noise.uniform_tokens(index, 0)
    rows = len(canvas)
    done, used, soft = np.zeros(rows, bool), np.zeros(rows, int), None
    total = own.max_denoising_steps
    for taken in range(total):
        if done.all():
            break
        used += ~done
        with torch.no_grad():
            logits = network.denoise(torch.from_numpy(canvas), cache, soft=soft)
        proportion = 1.0 - taken / total
        processed = logits.numpy() / np.float32(own.t_min + (own.t_max - own.t_min) * proportion)
        logs = processed - np.log(np.exp(processed - processed.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logs = logs - processed.max(-1, keepdims=True)
        entropies = -(np.exp(logs) * logs).sum(-1)
        sampled = (processed + noise.gumbel(index, taken + 1)).argmax(-1)
        fresh = noise.uniform_tokens(index, taken + 1)
        new = fresh.copy()
        for row in range(rows):
            spent = 0.0
            for place in np.argsort(entropies[row], kind="stable"):
                if spent > own.entropy_bound:
                    break
                new[row, place] = sampled[row, place]
                spent += entropies[row, place]
        same = (processed.argmax(-1) == canvas).all(-1)  # `canvas` is what went into this step
        stop = same & (entropies.mean(-1) <= own.confidence_threshold)
        canvas = np.where(done[:, None], canvas, new)
        done = done | stop
        with torch.no_grad():
            soft = network.soft_embeddings(torch.from_numpy(processed))
    return canvas, used


def official_generate(network: Any, tokens: Tensor, noise: Noise, own: GenerationConfig, canvases: int) -> Any:
    """All canvases: what has ended is padding, and the cache holds what is committed."""
    sequences, ended, steps = tokens.numpy(), np.zeros(len(tokens), bool), np.zeros(len(tokens), int)
    for index in range(canvases):
        cache = network.new_cache(batch=len(tokens))
        with torch.no_grad():
            network.encode(torch.from_numpy(sequences), cache)
        canvas, used = official_canvas(network, cache, noise, index, own)
        steps += np.where(ended, 0, used)
        for row in range(len(canvas)):
            if ended[row]:
                canvas[row] = own.pad_token_id
                continue
            ends = [place for place, token in enumerate(canvas[row]) if token in own.eos_token_ids]
            if ends:
                ended[row] = True
                canvas[row, ends[0] + 1 :] = own.pad_token_id
        sequences = np.concatenate([sequences, canvas], axis=1)
        if ended.all():
            break
    return sequences, steps


OFFICIAL = ["base", "all_full", "short_window", "multi_query", "top_one", "odd", "sharded", "large_vocab"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sampler(lab: Lab, name: str, seed: int) -> None:
    """With `policy=JAX` the loop gives the tokens and steps of the plain numpy loop."""
    spec, network = SPECS[name], lab.network(name)
    own = GenerationConfig(
        max_new_tokens=2 * spec.canvas,
        max_denoising_steps=9,
        entropy_bound=(0.2, 1.0, 4.0)[seed],
        confidence_threshold=(0.3, 0.6, 1.0)[seed],
        eos_token_ids=tuple(range(3, 3 + 2 * seed)),
        pad_token_id=0,
    )
    tokens = prompt(spec, 1 + (seed + spec.seed) % 3, 7 + 6 * seed, seed=seed)
    noise = Noise(seed, len(tokens), spec.canvas, spec.vocab)
    out = generate(network, tokens, defaults=own, policy=JAX, draws=noise)
    sequences, steps = official_generate(network, tokens, noise, own, canvases=2)
    assert np.array_equal(out.sequences.numpy(), sequences)
    assert out.denoising_steps.tolist() == steps.tolist()


def test_policies_differ(lab: Lab) -> None:
    """The two references' rules give different answers, so that each comparison above means something."""
    spec, network = SPECS["base"], lab.network("base")
    own = GenerationConfig(max_new_tokens=16, max_denoising_steps=9, entropy_bound=4.0, confidence_threshold=1.0)
    tokens = prompt(spec, 3, 8)
    both = [
        generate(network, tokens, defaults=own, policy=policy, draws=Noise(0, 3, spec.canvas, spec.vocab))
        for policy in (TRANSFORMERS, JAX)
    ]
    assert not torch.equal(both[0].sequences, both[1].sequences)
    early = [out.denoising_steps.min().item() for out in both]
    assert max(early) < 9, "no row stopped early"
