"""One step's arithmetic: a forward over all segments, then each canvas's beliefs and each sequence's next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import Canvas, CounterDraws
from ..diffusion.canvas import check_numbers, process, wish_of
from ..errors import DGemmaError
from ..events import TokenLogprob
from ..kernels.belief import Belief, read
from ..model import Mode, Network
from .pages import Pages, Table
from .ragged import RaggedView, Segment, Store
from .row import Row, logprobs_of

TILE_BYTES = 1 << 20  # scores in float32 that are held at once: what a core's own cache holds


@dataclass
class Work:
    """What one request does in one step.

    Fields:
        encode: committed tokens that are encoded.
        denoise: whether its canvas is looked at.
        denoised: positions of that canvas.
        given: tokens that its user got by it.
    """

    row: Row
    encode: int
    denoise: bool
    denoised: int = 0
    given: int = 0


class Forward:
    """The network and its cache."""

    def __init__(self, network: Network, pages: Pages):
        self.network = network
        self.store = Store(
            network.config,
            size=pages.size,
            full=pages.full.size,
            sliding=pages.sliding.size,
            device=network.device,
            dtype=network.dtype,
        )
        self.tile = max(16, TILE_BYTES // (4 * network.config.vocab_size))

    def clear(self, table: Table, tokens: int) -> None:
        """Reserves a table's pages for more tokens; the new ones hold zeros, never what a failed request left."""
        full, sliding = len(table.full), len(table.sliding)
        table.reserve(tokens)
        self.store.clear(table.full[full:], [page for page in table.sliding[sliding:] if page is not None])

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[tuple[Row, DGemmaError]]:
        """Does the step, and tells each request's user what it brings; returns those that failed alone, and why."""
        network, device = self.network, self.network.device
        encoding = [work for work in works if work.encode]
        denoising = [(work, work.row.look()) for work in works if work.denoise]
        segments = [encoding_of(work) for work in encoding]
        inputs: list[Tensor] = []
        if encoding:
            fresh = [token for work in encoding for token in fresh_of(work)]
            inputs.append(network.embed(torch.tensor([fresh], device=device)))
        if denoising:
            for work, canvas in denoising:
                work.denoised = canvas.tokens.shape[1]
                segments.append(Segment(table_of(work.row), len(work.row.history), work.denoised, Mode.DENOISE))
            tokens = torch.cat([canvas.tokens.to(device) for _, canvas in denoising], dim=1)
            soft = torch.cat([self._soft(work.row, canvas) for work, canvas in denoising], dim=1)
            inputs.append(network.self_conditioning.condition(network.embed(tokens), soft))

        view = RaggedView(self.store, segments, network.config.sliding_window, device)
        hidden = network.run(torch.cat(inputs, dim=1), view).split([s.length for s in segments], dim=1)

        failed: list[tuple[Row, DGemmaError]] = []
        for work, own in zip(encoding, hidden, strict=False):
            try:
                check_numbers(own)  # sound at the end: sound in every layer's keys and values, which others may reuse
                table_of(work.row).advance(work.row.history, work.encode)
            except DGemmaError as error:
                failed.append((work.row, error))
        broken = {id(row) for row, _ in failed}
        for (work, canvas), own in zip(denoising, hidden[len(encoding) :], strict=True):
            if id(work.row) in broken:
                continue
            before = len(work.row.tokens)
            try:
                work.row.settle(*self._believe(work.row, canvas, own))
            except DGemmaError as error:
                failed.append((work.row, error))
            work.given = len(work.row.tokens) - before
        self._next_tokens(
            [(work, own[0, -1]) for work, own in zip(encoding, hidden, strict=False) if is_next(work)], failed
        )
        return failed

    def _soft(self, row: Row, canvas: Canvas) -> Tensor:
        """Self-conditioning of the next look; on the first one the zero vector."""
        if row.soft is not None:
            return row.soft
        shape = (1, canvas.tokens.shape[1], self.network.config.hidden_size)
        return torch.zeros(shape, dtype=self.network.dtype, device=self.network.device)

    def _believe(self, row: Row, canvas: Canvas, hidden: Tensor) -> tuple[Belief, Tensor, list[TokenLogprob]]:
        """Hidden states [1, L, H] -> beliefs, soft embeddings and log-probabilities, in tiles of positions."""
        params, length, device = row.request.params, hidden.shape[1], hidden.device
        greedy, top = params.temperature == 0, params.logprobs
        number = canvas.number + 1
        uniform = None if greedy else row.draws.uniform(canvas.index, number, CounterDraws.SAMPLE, length)
        wish = canvas.wish
        if wish is not None and top is None and device.type == "cpu" and self.network.ranks is None:
            hint = canvas.likeliest
            rows = (None if given is None else given[0] for given in (uniform, hint))
            look = self.network.look(hidden[0], wish, *rows)
            assert look.soft is not None
            return Belief(*(values[None] for values in look.found)), look.soft[None], []
        beliefs, soft, logprobs = [], [], []
        for first in range(0, length, self.tile):
            part = slice(first, first + self.tile)
            scores = self.network.logits(hidden[:, part])
            own = None if uniform is None else uniform[:, part].to(device)
            belief, weights, total = read(canvas.process(scores, first), own)
            beliefs.append(Belief(*(values.cpu() for values in belief)))
            soft.append((self.network.blend(weights) / total).to(self.network.dtype))
            if top is not None:
                pins = canvas.pins[0, part]
                logprobs += logprobs_of(scores[0], torch.where(pins >= 0, pins, beliefs[-1].argmax[0]).to(device), top)
        fields = (torch.cat(parts, dim=1) for parts in zip(*beliefs, strict=True))
        return Belief(*fields), torch.cat(soft, dim=1), logprobs

    def _next_tokens(self, rows: list[tuple[Work, Tensor]], failed: list[tuple[Row, DGemmaError]]) -> None:
        """Autoregressive mode: one more token of each request, from its last hidden state [H]."""
        for first in range(0, len(rows), self.tile):
            part = rows[first : first + self.tile]
            scores = self.network.logits(torch.stack([hidden for _, hidden in part])[None])
            for (work, _), own in zip(part, scores.split(1, dim=1), strict=True):
                before = len(work.row.tokens)
                try:
                    self._next_token(work.row, own)
                except DGemmaError as error:
                    failed.append((work.row, error))
                work.given = len(work.row.tokens) - before

    def _next_token(self, row: Row, scores: Tensor) -> None:
        params, number = row.request.params, len(row.tokens)
        check_numbers(scores)
        wish = wish_of(params, 1.0, row.ends, int(number < params.min_tokens))
        processed = process(scores, params, wish).cpu()
        chosen = processed.argmax(dim=-1) if params.temperature == 0 else row.draws.sample(number, 0, processed)
        logprobs = [] if params.logprobs is None else logprobs_of(scores[0], chosen[0], params.logprobs)
        row.append(int(chosen), logprobs)


def table_of(row: Row) -> Table:
    """The pages of a request in the batch."""
    assert row.table is not None
    return row.table


def fresh_of(work: Work) -> list[int]:
    """The tokens that a request's work encodes."""
    start = table_of(work.row).length
    return work.row.history[start : start + work.encode]


def encoding_of(work: Work) -> Segment:
    """Where they go."""
    table = table_of(work.row)
    return Segment(table, table.length, work.encode, Mode.ENCODE)


def is_next(work: Work) -> bool:
    """Whether an autoregressive request has all of its sequence encoded by this step."""
    return not work.row.diffusion and work.row.pending == 0
