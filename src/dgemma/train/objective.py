"""The training objective: a denoiser's cross-entropy on noisy canvases plus the encoder's next-token cross-entropy.

The clean sequence is encoded once, causally and with gradient; its keys and values are what the canvases see of
what came before them. A canvas never sees the clean tokens of its own place or later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import AttentionShape
from ..diffusion.sampling import accept
from ..kernels.belief import read
from ..model import Mode, Network, View
from .data import Batch
from .head import cross_entropy

T_MIN, T_MAX = 0.4, 0.8  # the sampler's temperatures


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is added up.

    Fields:
        self_conditioning: share of canvases that see the beliefs of a first pass.
        autoregressive: weight of the encoder's next-token loss.
        fill_weight: weight of a fill position beside a position of the answer.
        balance: weight of the expert-balancing term (Switch Transformer, equation 4), for training from scratch.
        t_min: the least noise; t is uniform on (t_min, 1 - t_min).
        ordered: share of canvases that are clean up to a random place and noise behind it. Scattered noise leaves most
            results somewhere to be copied from; here they must be worked out from what comes before.
        unrolled: share of canvases that a step of the sampler has already been over, among those with a first pass:
            what it settled may be wrong, and is to be put right (Savinov et al. 2021, arXiv:2112.06749). Canvases of
            open responses are left out: what differs from the example's words there is no mistake.
    """

    self_conditioning: float = 0.5
    autoregressive: float = 1.0
    fill_weight: float = 1.0
    balance: float = 0.0
    t_min: float = 1e-4
    ordered: float = 0.0
    unrolled: float = 0.0


@dataclass(frozen=True)
class Losses:
    """The sum that is differentiated, and its parts; `accuracy` is the share of answer positions guessed right."""

    total: Tensor
    denoise: Tensor
    autoregressive: Tensor
    balance: Tensor
    accuracy: Tensor


class _Routing:
    """Collects the expert-balancing term over the layers of a forward."""

    def __init__(self) -> None:
        self.terms: list[Tensor] = []

    def observe_routing(self, probabilities: Tensor, experts: Tensor) -> None:
        count = probabilities.shape[-1]
        load = torch.bincount(experts.flatten(), minlength=count) / experts.numel()
        self.terms.append(count * (load * probabilities.mean(dim=0)).sum())


class SequenceView(_Routing, View):
    """Causal view of whole clean sequences that starts from nothing and keeps every layer's keys and values."""

    mode = Mode.ENCODE

    def __init__(self, batch: Batch, window: int):
        View.__init__(self, torch.arange(batch.tokens.shape[1], device=batch.tokens.device))
        _Routing.__init__(self)
        distance = self.positions[:, None] - self.positions[None, :]
        self.masks = {False: distance >= 0, True: (distance >= 0) & (distance < window)}
        self.kept: list[tuple[Tensor, Tensor]] = []

    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.kept.append((keys, values))
        return keys, values, self.masks[shape.sliding]


class CanvasView(_Routing, View):
    """View of canvases: each sees its own sequence before its start (the last `window - 1` entries of it in sliding
    layers) and itself, bidirectionally.
    """

    mode = Mode.DENOISE

    def __init__(self, sequences: SequenceView, owner: Tensor, start: Tensor, length: int, window: int):
        View.__init__(self, start[:, None] + torch.arange(length, device=start.device))
        _Routing.__init__(self)
        self.sequences, self.owner = sequences, owner
        before = start[:, None] - sequences.positions[None, :]  # [R, S]: how far before the canvas an entry lies
        itself = before.new_ones(len(start), length, dtype=torch.bool)
        seen = {False: before > 0, True: (before > 0) & (before < window)}
        self.masks = {sliding: torch.cat([mask, itself], dim=1)[:, None, None, :] for sliding, mask in seen.items()}

    def extend(
        self, layer: int, shape: AttentionShape, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        before_keys, before_values = (kept.index_select(0, self.owner) for kept in self.sequences.kept[layer])
        mask = self.masks[shape.sliding].expand(-1, 1, keys.shape[2], -1)
        return torch.cat([before_keys, keys], dim=2), torch.cat([before_values, values], dim=2), mask


def add_noise(batch: Batch, vocabulary: int, objective: Objective, generator: torch.Generator) -> Tensor:
    """The batch's canvases [R, L] with each token replaced with probability t by a uniform one; one t a canvas.

    In the `ordered` share t is 0 up to a place that is uniform over the answer's part of the canvas, and 1 behind it.
    """
    canvas = batch.canvas
    rows, length = canvas.shape
    t = objective.t_min + (1 - 2 * objective.t_min) * torch.rand(rows, 1, generator=generator)
    replaced = torch.rand(canvas.shape, generator=generator) < t
    if objective.ordered:
        answer = (~batch.filled).sum(dim=1, keepdim=True).cpu()
        behind = torch.arange(length) >= (torch.rand(rows, 1, generator=generator) * answer).floor()
        replaced = torch.where(torch.rand(rows, 1, generator=generator) < objective.ordered, behind, replaced)
    noise = torch.randint(0, vocabulary, canvas.shape, generator=generator)
    return torch.where(replaced.to(canvas.device), noise.to(canvas.device), canvas)


def sampler_step(network: Network, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One step of the sampler from what the network believes, hidden [R, L, H] -> canvases [R, L], soft embeddings.

    Temperatures are those of the sampler's schedule; the entropy that is accepted is up to twenty times its bound, so
    that there are mistakes to learn from.
    """
    rows, length, _ = hidden.shape
    vocabulary, device = network.config.vocab_size, hidden.device
    heat = T_MIN + (T_MAX - T_MIN) * torch.rand(rows, 1, 1, generator=generator)
    bound = 0.1 * 20.0 ** torch.rand(rows, 1, generator=generator)
    uniform = torch.rand(rows, length, generator=generator)
    noise = torch.randint(0, vocabulary, (rows, length), generator=generator)
    belief, weights, total = read(network.logits(hidden) / heat.to(device), uniform.to(device))
    canvas = torch.where(accept(belief.entropies, bound.to(device)), belief.sampled, noise.to(device))
    return canvas, network.blend(weights) / total


def compute(network: Network, batch: Batch, objective: Objective, generator: torch.Generator) -> Losses:
    """Losses of one batch; every random number comes from `generator` (on the CPU)."""
    window = network.config.sliding_window
    noisy = add_noise(batch, network.config.vocab_size, objective, generator)

    sequences = SequenceView(batch, window)
    hidden = network.run(network.embed(batch.tokens), sequences)
    autoregressive = _next_token_loss(network, hidden, batch)

    def look(rows: slice, soft: Tensor | None) -> tuple[Tensor, CanvasView]:
        view = CanvasView(sequences, batch.owner[rows], batch.start[rows], noisy.shape[1], window)
        return network.run(network.self_conditioning.condition(network.embed(noisy[rows]), soft), view), view

    # The order of canvases in a batch is random, so the first ones are as good a draw as any.
    conditioned = int(objective.self_conditioning * len(noisy) + torch.rand(1, generator=generator).item())
    soft = torch.zeros(*noisy.shape, network.config.hidden_size, device=noisy.device, dtype=network.dtype)
    if conditioned:
        with torch.no_grad():
            believed, _ = look(slice(0, conditioned), None)
            ahead = ~batch.open[:conditioned]
            ahead[round(objective.unrolled * len(noisy)) :] = False
            plain, ahead = (~ahead).nonzero()[:, 0], ahead.nonzero()[:, 0]
            soft[plain] = network.soft_embeddings(network.logits(believed[plain]))
            noisy[ahead], soft[ahead] = sampler_step(network, believed[ahead], generator)
    hidden, view = look(slice(None), soft)

    weights = 1.0 - (1.0 - objective.fill_weight) * batch.filled.float()
    denoise, hits = _loss(network, hidden.flatten(0, 1), batch.canvas.flatten(), weights.flatten())
    right = hits.view_as(batch.filled) & ~batch.filled
    accuracy = right.sum() / (~batch.filled).sum().clamp_min(1)

    balance = torch.stack(sequences.terms + view.terms).mean()
    total = denoise + objective.autoregressive * autoregressive + objective.balance * balance
    return Losses(total, denoise.detach(), autoregressive.detach(), balance.detach(), accuracy)


def _next_token_loss(network: Network, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the final assistant turn's tokens, each given all before it."""
    places = torch.arange(hidden.shape[1] - 1, device=hidden.device)[None, :]
    scored = (places + 1 >= batch.prompts[:, None]) & (places + 1 < batch.lengths[:, None])
    targets = batch.tokens[:, 1:][scored]
    return _loss(network, hidden[:, :-1][scored], targets, torch.ones_like(targets, dtype=torch.float32))[0]


def _loss(network: Network, hidden: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of [N, H], and which rows guess right [N]."""
    cap = network.config.final_logit_softcapping or 1e4  # far beyond any score: no cap
    return cross_entropy(hidden, network.embed_tokens.weight, targets, weights / weights.sum(), cap)
