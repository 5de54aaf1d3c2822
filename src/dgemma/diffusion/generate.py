"""The readable reference loop: block diffusion from a prompt to a finished sequence.

`settle` denoises one canvas, `generate` strings canvases together. With the default policy and draws this equals
transformers' `DiffusionGemmaForBlockDiffusion.generate` token for token in float32 on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from ..model import Cache, Network
from ..params import GenerationConfig, SamplingParams
from .draws import Draws, GlobalDraws
from .policy import TRANSFORMERS, Policy, Stability
from .sampling import accept, after_end, entropy, keep_likely, refuse, temperature


@dataclass(frozen=True)
class Step:
    """The state after one denoising step of one canvas; rows that had stopped before are frozen.

    Fields:
        number: steps done, from 1.
        argmax, canvas: the likeliest tokens, and the next step's input, [B, L].
        accepted: positions that kept their sample [B, L] bool.
        entropies: [B, L].
        active: rows that took part in this step [B] bool.
        finished: rows whose canvas is done now [B] bool.
        committed: what would be committed now [B, L].
    """

    number: int
    argmax: Tensor
    canvas: Tensor
    accepted: Tensor
    entropies: Tensor
    active: Tensor
    finished: Tensor
    committed: Tensor


@dataclass(frozen=True)
class Output:
    """What `generate` returns.

    Fields:
        sequences: prompt and answer [B, S + canvases * L], padded after the end token.
        denoising_steps: steps each row took while it was active [B].
        steps_per_canvas: the same by canvas, [canvases][B].
    """

    sequences: Tensor
    denoising_steps: Tensor
    steps_per_canvas: list[Tensor]


@torch.no_grad()
def settle(
    network: Network,
    cache: Cache,
    params: SamplingParams,
    settings: GenerationConfig,
    *,
    length: int,
    index: int = 0,
    policy: Policy = TRANSFORMERS,
    draws: Draws | None = None,
) -> Iterator[Step]:
    """Denoises the canvas that follows the cache, yielding after every step, until every row has stopped.

    Args:
        length: tokens of the canvas.
        index: number of the canvas in its answer, from 0.

    Raises:
        RequestError: the network's scores are not numbers.
    """
    draws = draws or GlobalDraws(network.device)
    rows, vocabulary = cache.batch, network.config.vocab_size
    ends = torch.tensor([*settings.eos_token_ids, *params.stop_token_ids], device=network.device)
    barred = max(0, min(length, params.min_tokens - index * length))  # positions that may not end the answer

    canvas = draws.start(index, rows, length, vocabulary)
    argmax, soft = canvas, None
    finished = torch.zeros(rows, dtype=torch.bool, device=network.device)
    stability = Stability(policy, settings.stability_threshold, canvas)

    for number, step in enumerate(range(settings.max_denoising_steps, 0, -1), start=1):
        processed = network.denoise(canvas, cache, soft)
        heat = temperature(step, settings.max_denoising_steps, settings.t_min, settings.t_max)
        processed = processed / (heat * (params.temperature or 1.0))
        if not torch.isfinite(processed).all():
            raise RequestError("the network's scores are not numbers (NaN or infinite); is the checkpoint sound?")
        if barred and len(ends):
            processed = refuse(processed, ends, slice(0, barred))
        processed = keep_likely(processed, params.top_k, params.top_p)

        likeliest = processed.argmax(dim=-1)
        sampled = likeliest if params.temperature == 0 else draws.sample(index, number, processed)
        entropies = entropy(processed)
        accepted = accept(entropies, settings.entropy_bound)
        noise = draws.renoise(index, number, rows, length, vocabulary)

        frozen = finished[:, None]
        argmax = torch.where(frozen, argmax, likeliest)
        canvas = torch.where(frozen, canvas, torch.where(accepted, sampled, noise))
        soft = network.soft_embeddings(processed)  # of no use to frozen rows, and no row sees another's

        active = ~finished
        stable = stability.update(argmax, canvas)
        confident = policy.confident(entropies.mean(dim=-1), settings.confidence_threshold)
        finished = finished | (stable & confident)
        yield Step(number, argmax, canvas, accepted, entropies, active, finished, policy.commit(argmax, canvas))
        if finished.all():
            return


@torch.no_grad()
def generate(
    network: Network,
    tokens: Tensor,
    params: SamplingParams | None = None,
    *,
    defaults: GenerationConfig | None = None,
    policy: Policy = TRANSFORMERS,
    draws: Draws | None = None,
) -> Output:
    """Continues prompts of equal length, tokens [B, S] int64, canvas by canvas.

    Args:
        params: what to change; None leaves every setting at its default.
        defaults: the checkpoint's generation settings; those it was loaded with if None.
        policy: which reference's rules hold.
        draws: random numbers; torch's global generator, in the reference's order, if None.

    Raises:
        RequestError: the prompt is empty or holds ids outside the vocabulary.
        CapacityError: prompt and answer do not fit the model's context.
    """
    params = params or SamplingParams()
    settings = params.resolve(defaults or network.generation)
    check_tokens(network, tokens)
    length = canvas_length(network, params)
    rows = tokens.shape[0]
    ends = torch.tensor([*settings.eos_token_ids, *params.stop_token_ids], device=tokens.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=tokens.device)
    steps_per_canvas: list[Tensor] = []

    cache = network.new_cache(rows)
    fresh = tokens
    for index in range(math.ceil(settings.max_new_tokens / length)):
        network.encode(fresh, cache)
        steps = torch.zeros(rows, dtype=torch.int64, device=tokens.device)
        for step in settle(network, cache, params, settings, length=length, index=index, policy=policy, draws=draws):
            steps += step.active & ~ended
        fresh = step.committed.clone()
        if settings.pad_token_id is not None:
            fresh[ended] = settings.pad_token_id
            fresh[after_end(fresh, ends)] = settings.pad_token_id
        ended = ended | torch.isin(step.committed, ends).any(dim=-1)
        steps_per_canvas.append(steps)
        tokens = torch.cat([tokens, fresh], dim=1)
        if ended.all():
            break
    return Output(tokens, torch.stack(steps_per_canvas).sum(dim=0), steps_per_canvas)


def canvas_length(network: Network, params: SamplingParams) -> int:
    """The canvas that a request asks for, or the checkpoint's own, which is the longest allowed."""
    own = network.config.canvas_length
    if params.canvas_length is not None and params.canvas_length > own:
        raise RequestError(f"canvas_length: {params.canvas_length} is above the checkpoint's own of {own}")
    return params.canvas_length or own


def check_tokens(network: Network, tokens: Tensor) -> None:
    """Refuses prompts that the network has no embedding for.

    Raises:
        RequestError: no token, or an id outside the vocabulary.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise RequestError("prompt: is empty; it needs at least one token")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= network.config.vocab_size:
        bad = low if low < 0 else high
        raise RequestError(f"prompt: token id {bad} is outside the vocabulary of {network.config.vocab_size}")
