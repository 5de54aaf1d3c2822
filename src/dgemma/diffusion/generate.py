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
from .canvas import Canvas, Step
from .draws import Draws, GlobalDraws
from .policy import TRANSFORMERS, Policy
from .sampling import after_end


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
    canvas = Canvas(
        params,
        settings,
        rows=cache.batch,
        length=length,
        vocabulary=network.config.vocab_size,
        index=index,
        before=index * length,
        policy=policy,
        draws=draws or GlobalDraws(network.device),
    )
    soft = None
    while not canvas.over:
        processed = canvas.process(network.denoise(canvas.tokens, cache, soft))
        belief = canvas.believe(processed)
        soft = network.soft_embeddings(processed)  # of no use to frozen rows, and no row sees another's
        yield canvas.update(belief)


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
