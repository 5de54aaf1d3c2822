"""The network against transformers in float32: encode, denoise, self-conditioning, caches, chunks and batches."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dgemma.errors import CapacityError
from tiny import SPECS, Lab, Reference, Spec, prompt

NAMES = list(SPECS)
# float32, absolute: only the order of sums differs. Logits go up to 30, hidden states and cache entries to about 5;
# the largest gaps seen are 3e-5 and 3e-6.
BOUND = 1e-4
STATE_BOUND = 2e-5


def lengths(spec: Spec) -> tuple[int, int]:
    """A prompt that fits the sliding window with the canvas still inside, and one well beyond it."""
    return max(1, spec.window // 2) if spec.window < 100 else 30, spec.window + spec.canvas + 3


def batch_of(spec: Spec) -> int:
    """1 to 3, so that every size is met."""
    return 1 + spec.seed % 3


def canvas_of(spec: Spec, batch: int, seed: int = 0) -> Tensor:
    """A canvas of noise [B, L]."""
    generator = torch.Generator().manual_seed(77 + seed)
    return torch.randint(0, spec.vocab, (batch, spec.canvas), generator=generator)


def chunks(tokens: Tensor, sizes: list[int]) -> list[Tensor]:
    """The tokens cut along S."""
    return list(tokens.split(sizes, dim=1))


def random_sizes(total: int, seed: int) -> list[int]:
    """A random split of `total` with parts of every size."""
    draw, sizes = random.Random(seed), []
    while total:
        sizes.append(draw.randint(1, max(1, total if draw.random() < 0.3 else total // 3)))
        total -= sizes[-1]
    return sizes


def encode(network: Any, parts: list[Tensor]) -> tuple[Any, Tensor]:
    """A fresh cache with the parts in it, and their hidden states [B, S, H]."""
    cache = network.new_cache(batch=parts[0].shape[0])
    with torch.no_grad():
        return cache, torch.cat([network.encode(part, cache) for part in parts], dim=1)


def reference_cache(reference: Reference, tokens: Tensor) -> Any:
    """transformers' cache of the tokens."""
    cache = reference.new_cache()
    reference.encode(tokens, cache)
    return cache


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; shapes and dtypes must agree, and nothing may be NaN."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert not ours.isnan().any() and not theirs.isnan().any()
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0


def assert_same_cache(one: Any, other: Any, bound: float = STATE_BOUND) -> None:
    """Two of our caches hold the same entries."""
    assert one.length == other.length
    for mine, yours in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
        assert gap(mine, yours) < bound


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_encode_and_denoise(lab: Lab, name: str, attention: str) -> None:
    """Hidden states and logits of three steps on a canvas, for prompts on both sides of the window."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name, attention=attention)
    batch = batch_of(spec)
    for length in lengths(spec):
        tokens = prompt(spec, batch, length, seed=length)
        cache, hidden = encode(network, [tokens])
        their_cache = reference.new_cache()
        assert gap(hidden, reference.encode(tokens, their_cache)) < STATE_BOUND
        soft = processed = None
        for step, temperature in enumerate((0.8, 0.6, 0.4)):
            canvas = canvas_of(spec, batch, step)
            with torch.no_grad():
                logits = network.denoise(canvas, cache, soft=soft)
            theirs = reference.denoise(canvas, their_cache, processed)
            assert gap(logits, theirs) < BOUND, f"step {step}"
            # Both go on from the same beliefs: through random weights a rounding error grows with every step.
            processed = theirs / temperature
            with torch.no_grad():
                soft = network.soft_embeddings(processed)
        assert logits.std() > 0.5, "flat logits would compare nothing"


@pytest.mark.parametrize("name", NAMES)
def test_cache_contents(lab: Lab, name: str) -> None:
    """Keys and values are those of transformers' cache; sliding layers keep the last window - 1 entries."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    for length in lengths(spec):
        tokens = prompt(spec, 2, length, seed=1)
        cache, _ = encode(network, [tokens])
        theirs = reference_cache(reference, tokens)
        for index, layer in enumerate(theirs.layers):
            kept = min(length, spec.window - 1) if spec.layers[index] == "s" else length
            assert cache.keys[index].shape[2] == kept
            assert gap(cache.keys[index], layer.keys[:, :, -kept:]) < STATE_BOUND
            assert gap(cache.values[index], layer.values[:, :, -kept:]) < STATE_BOUND


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill(lab: Lab, name: str) -> None:
    """Any split of the prompt gives one cache: random cuts, single tokens, chunks wider than the window."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    batch, length = batch_of(spec), lengths(spec)[1]
    tokens = prompt(spec, batch, length, seed=2)
    whole, hidden = encode(network, [tokens])
    splits = [random_sizes(length, seed) for seed in range(4)]
    # The first of two chunks is wider than the window; then a short one ends just before, at and behind its edge.
    splits += [[spec.window + 1, length - spec.window - 1]]
    splits += [[edge, length - edge] for edge in (spec.window - 1, spec.window)]
    if spec.window < 100:
        splits += [[1] * length]
    canvas = canvas_of(spec, batch)
    truth = reference.denoise(canvas, reference_cache(reference, tokens))
    for sizes in splits:
        cache, pieces = encode(network, chunks(tokens, sizes))
        assert_same_cache(cache, whole)
        assert gap(pieces, hidden) < STATE_BOUND
        with torch.no_grad():
            assert gap(network.denoise(canvas, cache), truth) < BOUND, sizes


@pytest.mark.parametrize("name", NAMES)
def test_far_facts_survive_chunks(lab: Lab, name: str) -> None:
    """The first token, far outside the window, still shows in the logits, and equally so however it was encoded.

    A known engine loses facts where chunking meets the sliding window.
    """
    spec, network = SPECS[name], lab.network(name)
    length = lengths(spec)[1]
    tokens = prompt(spec, 1, length, seed=3)
    other = tokens.clone()
    other[0, 0] = 3 + (tokens[0, 0] - 2) % (spec.vocab - 6)
    canvas = canvas_of(spec, 1)

    def effect(sizes: list[int]) -> Tensor:
        with torch.no_grad():
            pair = [network.denoise(canvas, encode(network, chunks(t, sizes))[0]) for t in (tokens, other)]
        return pair[1] - pair[0]

    whole = effect([length])
    assert whole.abs().max() > 100 * BOUND
    assert gap(effect(random_sizes(length, 9)), whole) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_several_canvases(lab: Lab, name: str) -> None:
    """A cache that grows canvas by canvas, with denoising in between, equals a fresh encode of everything."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    batch = 2
    parts = [prompt(spec, batch, 5, seed=4), *(canvas_of(spec, batch, seed) for seed in range(3))]
    cache, theirs = network.new_cache(batch=batch), reference.new_cache()
    for index, part in enumerate(parts):
        canvas = canvas_of(spec, batch, 10 + index)
        with torch.no_grad():
            hidden = network.encode(part, cache)
            first = network.denoise(canvas, cache)
            again = network.denoise(canvas, cache)
        assert gap(hidden, reference.encode(part, theirs)) < STATE_BOUND
        assert torch.equal(first, again), "denoise has changed the cache"
        assert gap(first, reference.denoise(canvas, theirs)) < BOUND
        fresh, _ = encode(network, [torch.cat(parts[: index + 1], dim=1)])
        assert_same_cache(cache, fresh)
        with torch.no_grad():
            assert gap(network.denoise(canvas, fresh), first) < STATE_BOUND * 5


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_mix(lab: Lab, name: str) -> None:
    """A row gives the same alone and among others, self-conditioning included."""
    spec, network = SPECS[name], lab.network(name)
    length = lengths(spec)[0] + 4
    tokens, canvas = prompt(spec, 3, length, seed=5), canvas_of(spec, 3)
    beliefs = torch.randn(3, spec.canvas, spec.vocab, generator=torch.Generator().manual_seed(5)) * 5

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cache = network.new_cache(batch=tokens[rows].shape[0])
            hidden = network.encode(tokens[rows], cache)
            return hidden, network.denoise(canvas[rows], cache, soft=network.soft_embeddings(beliefs[rows]))

    hidden, logits = run(slice(0, 3))
    assert gap(hidden[0], hidden[1]) > 0.1, "the rows were to differ"
    for row in range(3):
        alone_hidden, alone_logits = run(slice(row, row + 1))
        assert gap(alone_hidden[0], hidden[row]) < STATE_BOUND
        assert gap(alone_logits[0], logits[row]) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_head(lab: Lab, name: str) -> None:
    """`logits` is the tied head with the soft cap, on encoder states: what autoregressive mode reads."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    cap = spec.softcap or 30.0
    tokens = prompt(spec, 2, 11, seed=6)
    _, hidden = encode(network, [tokens])
    with torch.no_grad():
        logits = network.logits(hidden)
    table = reference.model.model.decoder.embed_tokens.weight.detach()
    brute = cap * torch.tanh(torch.einsum("bsh,vh->bsv", hidden.double(), table.double()) / cap)
    assert logits.dtype == torch.float32
    assert gap(logits.double(), brute) < BOUND
    assert gap(logits, reference.logits(reference.encode(tokens, reference.new_cache()))) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_soft_embeddings(lab: Lab, name: str) -> None:
    """Softmax over the vocabulary, times the table, times sqrt(H); a certain belief is that token's embedding."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    table = reference.model.model.decoder.embed_tokens.weight.detach().double()
    processed = torch.randn(2, spec.canvas, spec.vocab, generator=torch.Generator().manual_seed(8)) * 6
    with torch.no_grad():
        soft = network.soft_embeddings(processed)
    brute = torch.softmax(processed.double(), dim=-1) @ table * spec.hidden**0.5
    assert gap(soft.double(), brute) < BOUND
    certain = torch.full((1, 1, spec.vocab), -1e4)
    certain[0, 0, 7] = 0.0
    with torch.no_grad():
        assert gap(network.soft_embeddings(certain)[0, 0].double(), table[7] * spec.hidden**0.5) < BOUND


@pytest.mark.parametrize("name", ["base", "thetas"])
def test_empty_prefix_soft_zero(lab: Lab, name: str) -> None:
    """No self-conditioning means the zero vector, not "skip the module"."""
    spec, network = SPECS[name], lab.network(name)
    cache, _ = encode(network, [prompt(spec, 2, 6)])
    canvas = canvas_of(spec, 2)
    with torch.no_grad():
        none = network.denoise(canvas, cache)
        zero = network.denoise(canvas, cache, soft=torch.zeros(2, spec.canvas, spec.hidden))
    assert gap(none, zero) < STATE_BOUND


@pytest.mark.parametrize("name", ["base", "odd", "top_one"])
def test_canvas_shorter_than_trained(lab: Lab, name: str) -> None:
    """A canvas of any length runs, and as transformers runs it."""
    spec, network, reference = SPECS[name], lab.network(name), lab.reference(name)
    tokens = prompt(spec, 2, 9)
    cache, theirs = encode(network, [tokens])[0], reference_cache(reference, tokens)
    for length in (1, 5, spec.canvas * 2):
        canvas = torch.randint(0, spec.vocab, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert gap(network.denoise(canvas, cache), reference.denoise(canvas, theirs)) < BOUND


def test_every_weight_counts(lab: Lab) -> None:
    """A nudge to any one weight tensor shows in the outputs; nothing that is loaded is ignored."""
    spec, network = SPECS["base"], lab.network("base")
    tokens, canvas = prompt(spec, 1, 9), canvas_of(spec, 1)
    soft = torch.randn(1, spec.canvas, spec.hidden, generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            cache, hidden = encode(network, [tokens])
            return hidden, network.denoise(canvas, cache, soft=soft)

    hidden, logits = run()
    state = network.state_dict()
    assert len(state) > 20 * len(spec.layers)
    last = f"layers.{len(spec.layers) - 1}."
    for key, tensor in state.items():
        if key.startswith(last) and key.endswith("_scalar"):
            continue  # what scales the last layer's output cancels in the final norm
        saved = tensor.clone()
        tensor.mul_(1.2).add_(0.05)
        new_hidden, new_logits = run()
        tensor.copy_(saved)
        change = max(gap(new_hidden, hidden), gap(new_logits, logits))
        assert change > BOUND, f"{key} has no effect"
    assert gap(run()[1], logits) == 0.0


def test_encoder_and_denoiser_scalars(lab: Lab) -> None:
    """Each mode multiplies by its own `layer_scalar`: exchanging the two changes both."""
    spec, network, reference = SPECS["base"], lab.network("base"), lab.reference("base")
    encoder = [layer.layer_scalar.item() for layer in reference.model.model.encoder.language_model.layers]
    decoder = [layer.layer_scalar.item() for layer in reference.model.model.decoder.layers]
    assert all(abs(a - b) > 0.01 and abs(a - 1) > 0.01 for a, b in zip(encoder, decoder, strict=True))
    tokens, canvas = prompt(spec, 1, 9), canvas_of(spec, 1)
    wrong = reference_cache(reference, tokens)
    for layer, mine in zip(reference.model.model.decoder.layers, encoder, strict=True):
        layer.layer_scalar.fill_(mine)
    exchanged = reference.denoise(canvas, wrong)
    for layer, mine in zip(reference.model.model.decoder.layers, decoder, strict=True):
        layer.layer_scalar.fill_(mine)
    with torch.no_grad():
        ours = network.denoise(canvas, encode(network, [tokens])[0])
    assert gap(ours, exchanged) > 100 * BOUND
    assert gap(ours, reference.denoise(canvas, wrong)) < BOUND


def test_too_long_is_refused_and_costs_nothing(lab: Lab) -> None:
    """Past `max_position_embeddings` a forward raises and the cache stays as it was."""
    spec, network = SPECS["one_layer"], lab.network("one_layer")
    cache, _ = encode(network, [prompt(spec, 1, 8)])
    limit = network.config.max_position_embeddings
    with pytest.raises(CapacityError, match=str(limit)), torch.no_grad():
        network.encode(torch.full((1, limit - 7), 5), cache)
    assert cache.length == 8
    assert_same_cache(cache, encode(network, [prompt(spec, 1, 8)])[0], bound=1e-9)


def test_specs_are_what_they_say(lab: Lab) -> None:
    """The checkpoints on disk have the traits that their specs are there for."""

    def text(name: str) -> dict[str, Any]:
        return json.loads((lab.path(name) / "config.json").read_text())["text_config"]

    assert "per_layer_config" in text("base") and "global_head_dim" not in text("base")
    assert text("release_spelling")["global_head_dim"] == 16 and "per_layer_config" not in text("release_spelling")
    assert "final_logit_softcapping" not in text("cap_left_out")
    assert text("low_cap")["final_logit_softcapping"] == SPECS["low_cap"].softcap
    assert len(list(lab.path("sharded").glob("*.safetensors"))) > 3
    assert len(list(lab.path("base").glob("*.safetensors"))) == 1
    for name, spec in SPECS.items():
        config = lab.network(name).config
        assert [("s" if shape.sliding else "f") for shape in config.layers] == list(spec.layers)
        assert config.layers[-1].head_dim == spec.global_head_dim
        assert config.layers[-1].kv_heads == (spec.global_kv_heads or spec.kv_heads)
        assert config.canvas_length == spec.canvas and config.final_logit_softcapping == (spec.softcap or 30.0)
