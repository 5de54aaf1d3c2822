"""Canvases that live where the network is: a step's sampling for many requests at once, without asking the host.

What happens is `diffusion.Canvas` under the rules of transformers (`kernels/triton/settle.py`); the random numbers are
those of `CounterDraws`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion import Canvas, Step
from ..kernels.cpu import TOLERANCE
from ..kernels.triton import settle
from ..kernels.triton.settle import ENDS, LEVELS
from ..kernels.triton.vocabulary import step as look
from ..model import Network
from ..params import SamplingParams


class Board:
    """Places for canvases.

    Fields:
        held: what is known of the canvases.
        tokens: int64 [places, L], what the network looks at next; positions behind a shorter canvas's end mean nothing.
        soft: [places, L, H], soft embeddings of the last step; zeros before the first.

    Args:
        places: canvases at once.
        length: positions of the longest, L.
    """

    def __init__(self, network: Network, places: int, length: int):
        self.network, self.length = network, length
        self.held = settle.Held.empty(places, length, network.device)
        self.tokens = self.held.tokens
        self.soft = torch.zeros(places, length, network.config.hidden_size, dtype=network.dtype, device=network.device)
        self._scale = float(network.embedding_scale())

    def takes(self, canvas: Canvas) -> bool:
        """Whether `settle` can do all that a canvas's request wants of its scores."""
        return self.samples(canvas.params, canvas.before) and len(canvas.ends) <= ENDS

    def samples(self, params: SamplingParams, before: int) -> bool:
        """Whether the scores behind so many of an answer's tokens are sampled on the card."""
        likely = params.likely_alone and self.network.ranks is not None
        plain = not params.logit_bias and params.logprobs is None and before >= params.min_tokens
        return plain and not likely

    def begin(self, place: int, canvas: Canvas, seed: int) -> None:
        """Puts a canvas before its first step into a place."""
        settings, params, length = canvas.settings, canvas.params, canvas.tokens.shape[1]
        ends = canvas.ends.tolist()[:ENDS]
        whole = [
            signed(seed),
            canvas.index,
            length,
            settings.max_denoising_steps,
            settings.stability_threshold,
            int(params.stop_at_end),
            int(params.temperature == 0),
            *ends,
            *[-1] * (ENDS - len(ends)),
        ]
        real = [
            settings.t_min,
            settings.t_max - settings.t_min,
            params.temperature or 1.0,
            settings.entropy_bound,
            settings.confidence_threshold,
            *likely_of(params),
        ]
        held, device = self.held, self.tokens.device
        held.whole[place] = torch.tensor(whole, dtype=torch.int64).to(device, non_blocking=True)
        held.real[place] = torch.tensor(real).to(device, non_blocking=True)
        held.argmax[place], held.counts[place] = -1, 0
        self.put(place, canvas.tokens[0], None)
        self.pin(place, canvas.pins[0])

    def put(self, place: int, tokens: Tensor, soft: Tensor | None) -> None:
        """What the network looks at next: tokens [n], and soft embeddings [n, H] or zeros."""
        length = len(tokens)
        self.tokens[place, :length] = tokens.to(self.tokens.device, non_blocking=True)
        self.soft[place, :length] = 0.0 if soft is None else soft

    def pin(self, place: int, pins: Tensor) -> None:
        """Positions that keep a token, int64 [n], -1: none."""
        self.held.pins[place, : len(pins)] = pins.to(self.tokens.device, non_blocking=True)

    def settle(self, hidden: Tensor, places: Tensor, flags: Tensor, *, likely: bool) -> None:
        """One step of some canvases: hidden states [M * n, H] and their places int64 [M]; writes to `flags`, uint8 [M],
        how each stands.

        Each has its first n positions' states; n is no less than the longest's length. A place may be given twice: the
        first counts, and the others have no flag. `likely`: whether some are restricted to likely words.
        """
        config, n = self.network.config, len(hidden) // len(places)
        heats, uniforms = settle.ask(self.held, places, n)
        step = look(
            hidden,
            self.network.embed_tokens.weight,
            heats=heats,
            cap=config.final_logit_softcapping,
            tolerance=TOLERANCE[hidden.dtype],
            uniform=uniforms,
            peers=self.network.ranks,
            likely=self.held.real[places, LEVELS.value :].repeat_interleave(n, dim=0) if likely else None,
        )
        assert step.parts is not None
        settle.keep(step.parts, self._scale, self.soft, places)
        settle.settle(self.held, step.found, places, flags, config.vocab_size)

    def draw(self, hidden: Tensor, asked: Tensor, levels: Tensor, tokens: Tensor, *, likely: bool) -> None:
        """Autoregressive mode: writes to `tokens`, int64 [n], one for each of hidden states [n, H]; -1 where the scores
        are no numbers.

        Args:
            asked: int64 [3, n], see `settle.roll`.
            levels: float32 [4, n]: temperatures, and what `likely_of` gives.
            likely: whether some are restricted to likely words.
        """
        config = self.network.config
        step = look(
            hidden,
            self.network.embed_tokens.weight,
            heats=levels[0],
            cap=config.final_logit_softcapping,
            tolerance=TOLERANCE[hidden.dtype],
            uniform=settle.roll(asked),
            soft=False,
            peers=self.network.ranks,
            likely=levels[1:].T.contiguous() if likely else None,
        )
        settle.choose(asked, step.found, tokens)

    def step_of(self, place: int, canvas: Canvas, *, whole: bool) -> Step:
        """What a canvas's last step brought; its tokens, acceptance and entropies only if the `whole` is wanted."""
        length = canvas.tokens.shape[1]
        argmax = self.held.argmax[place, None, :length].cpu()
        if whole:
            parts = (self.tokens, self.held.accepted, self.held.entropies)
            tokens, accepted, entropies = (part[place, None, :length].cpu() for part in parts)
        else:
            tokens, accepted, entropies = argmax, torch.ones_like(argmax, dtype=torch.bool), torch.zeros(argmax.shape)
        return Step(
            number=canvas.number,
            argmax=argmax,
            canvas=tokens,
            accepted=accepted,
            entropies=entropies,
            active=torch.tensor([True]),
            finished=torch.tensor([True]),
            committed=canvas.policy.commit(argmax, tokens),
        )


def likely_of(params: SamplingParams) -> tuple[float, float, float]:
    """What a request restricts its words to, as `kernels.triton.likely` takes it."""
    return float(params.top_k or 0), params.top_p, params.min_p


def signed(seed: int) -> int:
    """A seed's 64 bits as an int64."""
    bits = seed % 2**64
    return bits - (bits >> 63 << 64)
