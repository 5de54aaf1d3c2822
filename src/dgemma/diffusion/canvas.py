"""One canvas from noise to tokens: what a step does once the network has looked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from ..kernels.belief import Belief
from ..kernels.wish import Wish
from ..params import GenerationConfig, SamplingParams
from .draws import Draws
from .policy import Policy, Stability
from .sampling import accept, entropy, keep_likely, temperature, through_end


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


class Canvas:
    """B canvases of L positions under way. `tokens` is what the network looks at next; `pins` are positions that keep
    a token whatever the network says ([B, L] int64, -1: none).

    Args:
        index: number of the canvas in its answer, from 0.
        before: tokens of the answer before it.
    """

    def __init__(
        self,
        params: SamplingParams,
        settings: GenerationConfig,
        *,
        rows: int,
        length: int,
        vocabulary: int,
        index: int,
        before: int,
        policy: Policy,
        draws: Draws,
    ):
        self.params, self.settings, self.policy, self.draws = params, settings, policy, draws
        self.index, self.before, self.vocabulary, self.number = index, before, vocabulary, 0
        self.tokens = draws.start(index, rows, length, vocabulary)
        device = self.tokens.device
        self.ends = torch.tensor([*settings.eos_token_ids, *params.stop_token_ids], dtype=torch.int64, device=device)
        self.pins = torch.full_like(self.tokens, -1)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self._argmax = self.tokens
        self._stability = Stability(policy, settings.stability_threshold, self.tokens)

    @property
    def over(self) -> bool:
        """Whether every row has stopped, or the steps are used up."""
        return self.number >= self.settings.max_denoising_steps or bool(self.finished.all())

    def process(self, scores: Tensor, first: int = 0) -> Tensor:
        """The network's scores [B, n, V] of the positions from `first` on -> what the next token is drawn from."""
        return process(scores, self.params, self._wish.after(first))

    @property
    def wish(self) -> Wish | None:
        """What `process` does, for kernels that do it themselves; None where it also looks for the likeliest words."""
        return None if self.params.likely_alone else self._wish

    @property
    def likeliest(self) -> Tensor | None:
        """The likeliest tokens [B, L] of the last step; None before the first."""
        return self._argmax if self.number else None

    @property
    def _wish(self) -> Wish:
        settings = self.settings
        step = settings.max_denoising_steps - self.number
        heat = temperature(step, settings.max_denoising_steps, settings.t_min, settings.t_max)
        # Positions of this canvas that may not end the answer.
        barred = max(0, min(self.tokens.shape[1], self.params.min_tokens - self.before))
        return wish_of(self.params, heat, self.ends.tolist(), barred)

    def believe(self, processed: Tensor) -> Belief:
        """Argmax, sample and entropy of every position, of the processed scores [B, L, V].

        Raises:
            RequestError: the scores are not numbers.
        """
        entropies, likeliest = entropy(processed), processed.argmax(dim=-1)
        check_numbers(entropies)
        greedy = self.params.temperature == 0
        sampled = likeliest if greedy else self.draws.sample(self.index, self.number + 1, processed)
        return Belief(likeliest, sampled, entropies)

    def update(self, belief: Belief) -> Step:
        """Does a step: accepts, renoises, and sees whether rows are done.

        Raises:
            RequestError: the entropies are not numbers, since the network's scores are not; nothing has changed then.
        """
        check_numbers(belief.entropies)
        self.number += 1
        rows, length = self.tokens.shape
        accepted = accept(belief.entropies, self.settings.entropy_bound)
        noise = self.draws.renoise(self.index, self.number, rows, length, self.vocabulary)

        pinned, frozen = self.pins >= 0, self.finished[:, None]
        likeliest = torch.where(pinned, self.pins, belief.argmax)
        following = torch.where(pinned, self.pins, torch.where(accepted, belief.sampled, noise))
        self._argmax = torch.where(frozen, self._argmax, likeliest)
        self.tokens = torch.where(frozen, self.tokens, following)

        active = ~self.finished
        part = through_end(self._argmax, self.ends) if self.params.stop_at_end else None
        stable = self._stability.update(self._argmax, self.tokens, part)
        if part is None:
            mean = belief.entropies.mean(dim=-1)
        else:
            mean = (belief.entropies * part).sum(dim=-1) / part.sum(dim=-1)
        self.finished = self.finished | (stable & self.policy.confident(mean, self.settings.confidence_threshold))
        return Step(
            number=self.number,
            argmax=self._argmax,
            canvas=self.tokens,
            accepted=accepted | pinned,
            entropies=belief.entropies,
            active=active,
            finished=self.finished,
            committed=self.policy.commit(self._argmax, self.tokens),
        )


def wish_of(params: SamplingParams, heat: Tensor | float, ends: Iterable[int], barred: int) -> Wish:
    """What a request wants of its scores: biased, tempered by `heat` and its own temperature, without the end tokens at
    the first `barred` positions.
    """
    return Wish(
        heat=float(heat * (params.temperature or 1.0)),
        bias=tuple(dict(params.logit_bias or {}).items()),
        ends=tuple(ends),
        barred=barred,
    )


def process(scores: Tensor, params: SamplingParams, wish: Wish) -> Tensor:
    """Scores [B, n, V] as `wish` has them, restricted to likely words."""
    return keep_likely(wish.process(scores), params.top_k, params.top_p, params.min_p)


def check_numbers(values: Tensor) -> None:
    """Refuses to go on with what is not a number.

    Raises:
        RequestError: a value is NaN or infinite.
    """
    if not torch.isfinite(values).all():
        raise not_numbers()


def not_numbers() -> RequestError:
    """What a request fails with whose scores are NaN or infinite."""
    return RequestError("the network's scores are not numbers (NaN or infinite); is the checkpoint sound?")
