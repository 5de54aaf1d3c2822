"""Canvases that live where the network is: a step's sampling for many requests at once, without asking the host.

What happens is `diffusion.Canvas` under the rules of transformers, row by row on tensors; the random numbers are those
of `CounterDraws`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..diffusion import Canvas, Step
from ..diffusion.sampling import accept, through_end
from ..kernels.cpu import TOLERANCE
from ..kernels.triton.draws import draws
from ..kernels.triton.vocabulary import step as look
from ..model import Network

ENDS = 16  # end tokens that a place has room for
GOES_ON, OVER, BROKEN = 0, 1, 2  # what `settle` says of a canvas


class Board:
    """Places for canvases.

    Fields:
        tokens: int64 [places, L], what the network looks at next; positions behind a shorter canvas's end mean nothing.
        soft: [places, L, H], soft embeddings of the last step; zeros before the first.

    Args:
        places: canvases at once.
        length: positions of the longest, L.
    """

    def __init__(self, network: Network, places: int, length: int):
        device = network.device
        self.network, self.length = network, length
        self.tokens = torch.zeros(places, length, dtype=torch.int64, device=device)
        self.soft = torch.zeros(places, length, network.config.hidden_size, dtype=network.dtype, device=device)
        self._argmax, self._pins = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self._accepted = torch.zeros_like(self.tokens, dtype=torch.bool)
        self._entropies = torch.zeros(places, length, device=device)
        self._held, self._number = torch.zeros(2, places, dtype=torch.int64, device=device)
        self._whole = torch.zeros(places, 7 + ENDS, dtype=torch.int64, device=device)
        self._real = torch.zeros(places, 5, device=device)

    @staticmethod
    def takes(canvas: Canvas) -> bool:
        """Whether `settle` can do all that a canvas's request wants of its scores."""
        params, wish = canvas.params, canvas.wish
        plain = wish is not None and not wish.bias and not wish.barred and params.logprobs is None
        return plain and len(canvas.ends) <= ENDS

    def begin(self, place: int, canvas: Canvas, seed: int) -> None:
        """Puts a canvas before its first step into a place."""
        settings, params, length = canvas.settings, canvas.params, canvas.tokens.shape[1]
        ends = canvas.ends.tolist()[:ENDS]
        whole = [
            _signed(seed),
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
        ]
        self._whole[place] = torch.tensor(whole, dtype=torch.int64).to(self._whole.device, non_blocking=True)
        self._real[place] = torch.tensor(real).to(self._real.device, non_blocking=True)
        self._argmax[place] = -1
        self._held[place] = self._number[place] = 0
        self.put(place, canvas.tokens[0], None)
        self.pin(place, canvas.pins[0])

    def put(self, place: int, tokens: Tensor, soft: Tensor | None) -> None:
        """What the network looks at next: tokens [n], and soft embeddings [n, H] or zeros."""
        length = len(tokens)
        self.tokens[place, :length] = tokens.to(self.tokens.device, non_blocking=True)
        self.soft[place, :length] = 0.0 if soft is None else soft

    def pin(self, place: int, pins: Tensor) -> None:
        """Positions that keep a token, int64 [n], -1: none."""
        self._pins[place, : len(pins)] = pins.to(self._pins.device, non_blocking=True)

    def settle(self, hidden: Tensor, places: Tensor) -> Tensor:
        """One step of some canvases: hidden states [M * n, H] and their places int64 [M] -> uint8 [M], how each stands.

        Each has its first n positions' states; n is no less than the longest's length. A place may be given twice.
        """
        whole, real, number = self._whole[places], self._real[places], self._number[places]
        seeds, indices, lengths, steps, threshold, partial, greedy = whole[:, :7].unbind(dim=1)
        t_min, t_span, heat, bound, confidence = real.unbind(dim=1)
        rows, width, config = len(places), len(hidden) // len(places), self.network.config
        uniforms = torch.empty(rows, width, device=hidden.device)
        noise = torch.empty(rows, width, dtype=torch.int64, device=hidden.device)
        draws(seeds.contiguous(), indices.contiguous(), number + 1, uniforms, noise, config.vocab_size)

        heats = (t_min + t_span * ((steps - number).float() / steps.float())) * heat
        found = look(
            hidden,
            self.network.embed_tokens.weight,
            heats=heats[:, None].expand(rows, width),
            cap=config.final_logit_softcapping,
            tolerance=TOLERANCE[hidden.dtype],
            uniform=uniforms.flatten(),
            peers=self.network.ranks,
        )
        argmax, sampled, entropies = (part.view(rows, width) for part in found.found)
        sampled = torch.where(greedy[:, None] != 0, argmax, sampled)

        inside = torch.arange(width, device=hidden.device) < lengths[:, None]
        sound = (torch.isfinite(entropies) | ~inside).all(dim=-1)
        accepted = accept(torch.where(inside, entropies, float("inf")), bound[:, None])
        pins = self._pins[places, :width]
        pinned = pins >= 0
        likeliest = torch.where(pinned, pins, argmax)
        following = torch.where(pinned, pins, torch.where(accepted, sampled, noise))

        through = through_end(torch.where(inside, likeliest, -2), whole[:, 7:])
        part = inside & (through | (partial == 0)[:, None])
        same = ((likeliest == self._argmax[places, :width]) | ~part).all(dim=-1)
        held = torch.where(same, self._held[places] + 1, 0)
        mean = torch.where(part, entropies, 0.0).sum(dim=-1) / part.sum(dim=-1)
        over = ((held >= threshold) & (mean < confidence)) | (number + 1 >= steps)

        assert found.soft is not None
        self.tokens[places, :width], self._argmax[places, :width] = following, likeliest
        self._accepted[places, :width], self._entropies[places, :width] = accepted | pinned, entropies
        self._held[places], self._number[places] = held, number + 1
        soft = found.soft.to(hidden.dtype).view(rows, width, -1) * self.network.embedding_scale()
        self.soft[places, :width] = soft
        return torch.where(sound, over.to(torch.uint8) * OVER, BROKEN).to(torch.uint8)

    def next_tokens(
        self, hidden: Tensor, seeds: Sequence[int], numbers: Sequence[int], temperatures: Sequence[float]
    ) -> list[int]:
        """Autoregressive mode: a token each for hidden states [n, H], the `numbers`-th of their answers; -1 where the
        scores are no numbers.
        """
        device, rows, config = hidden.device, len(hidden), self.network.config
        whole = torch.tensor([[_signed(seed) for seed in seeds], numbers, [0] * rows], dtype=torch.int64).to(device)
        heats = torch.tensor([heat or 1.0 for heat in temperatures], device=device)
        greedy = torch.tensor([heat == 0 for heat in temperatures], device=device)
        uniforms = torch.empty(rows, 1, device=device)
        noise = torch.empty_like(uniforms, dtype=torch.int64)
        draws(whole[0], whole[1], whole[2], uniforms, noise, config.vocab_size)
        found, _, _ = look(
            hidden,
            self.network.embed_tokens.weight,
            heats=heats,
            cap=config.final_logit_softcapping,
            tolerance=TOLERANCE[hidden.dtype],
            uniform=uniforms[:, 0],
            soft=False,
            peers=self.network.ranks,
        )
        tokens = torch.where(greedy, found.argmax, found.sampled)
        result: list[int] = torch.where(torch.isfinite(found.entropies), tokens, -1).tolist()
        return result

    def step_of(self, place: int, canvas: Canvas, *, whole: bool) -> Step:
        """What a canvas's last step brought; its tokens, acceptance and entropies only if the `whole` is wanted."""
        length = canvas.tokens.shape[1]
        argmax = self._argmax[place, None, :length].cpu()
        if whole:
            parts = (self.tokens, self._accepted, self._entropies)
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


def _signed(seed: int) -> int:
    """A seed's 64 bits as an int64."""
    bits = seed % 2**64
    return bits - (bits >> 63 << 64)
