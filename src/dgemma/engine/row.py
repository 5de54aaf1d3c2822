"""One request under way: what it has so far, what it does next, what it tells its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion import TRANSFORMERS, Canvas, CounterDraws, Step
from ..events import Commit, Draft, Early, Finish, Result, Stats, TokenLogprob
from ..kernels.belief import Belief
from ..params import GenerationConfig, SamplingParams
from ..text import Tokenizer
from .early import RULES, Prefix
from .pages import Pages, Table
from .ticket import Ticket
from .writer import Writer

LEAST_CANVAS = 32  # a shorter canvas takes more steps, not fewer


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of an engine.

    Fields:
        settings: the checkpoint's defaults with the request's own values in their place.
        canvas: positions of a canvas at most.
        limit: tokens of prompt and answer at most.
        drafts: whether every step is told.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    settings: GenerationConfig
    canvas: int
    limit: int
    seed: int
    think: bool = False
    drafts: bool = False


class Row:
    """A request in the engine. Times are in seconds of the steps that it took part in."""

    def __init__(self, request: Request, ticket: Ticket, tokenizer: Tokenizer | None, vocabulary: int):
        self.request, self.ticket, self.vocabulary = request, ticket, vocabulary
        params = request.params
        self.diffusion = params.mode == "diffusion"
        self.ends = frozenset((*request.settings.eos_token_ids, *params.stop_token_ids))
        self.draws = CounterDraws([request.seed])
        self.writer = Writer(tokenizer, params.stop, think=request.think)
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.history = list(request.prompt)  # all that is committed; what the cache holds or will hold
        self.table: Table | None = None
        self.canvas: Canvas | None = None
        self.soft: Tensor | None = None  # of the canvas's last step [1, L, H]
        self.entered = self.stopped = False
        self.steps_per_canvas: list[int] = []
        self.seconds = self.stepping = self.encoding = 0.0
        self.encoded = self.reused = 0  # tokens; reused: of the prompt, when it first came into the batch
        self.first_text: float | None = None
        self._sent: list[int] = []  # what went out early of this canvas
        self._prefix: Prefix | None = None
        self._before: list[int] = []

    @property
    def missing(self) -> int:
        """Tokens that the answer may still get, in the end."""
        return self.request.settings.max_new_tokens - len(self.tokens) + len(self._sent)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.stopped or self.missing <= 0

    @property
    def pending(self) -> int:
        """Committed tokens that are not encoded."""
        return len(self.history) - (self.table.length if self.table else 0)

    def enter(self, pages: Pages, *, reuse: bool) -> int:
        """Gets a table of pages -> tokens that are there already."""
        self.table = Table(pages, known=reuse)
        return self.table.reuse(self.history) if reuse else 0

    def leave(self) -> None:
        """Gives the pages back. The canvas is kept: after another `enter` the request goes on where it was."""
        if self.table is not None:
            self.table.release()
            self.table = None

    def restart(self) -> None:
        """Forgets the canvas, which a failed step may have left half updated; the same one is drawn again."""
        if self.canvas is not None:
            self.canvas = self.soft = None
            self.steps_per_canvas.pop()

    def look(self) -> Canvas:
        """The canvas that is denoised next; a new one after a commit."""
        if self.canvas is None:
            request = self.request
            budget = max(LEAST_CANVAS, -(-self.missing // LEAST_CANVAS) * LEAST_CANVAS)
            length = min(request.canvas, budget, request.limit - len(self.history))
            self.canvas = Canvas(
                request.params,
                request.settings,
                rows=1,
                length=length,
                vocabulary=self.vocabulary,
                index=len(self.steps_per_canvas),
                before=len(self.history) - len(request.prompt),
                policy=TRANSFORMERS,
                draws=self.draws,
            )
            self.steps_per_canvas.append(0)
            rule = RULES.get(request.params.early_text)
            self._prefix = Prefix(rule, length) if rule else None
            self._before = []
        return self.canvas

    def settle(self, belief: Belief, soft: Tensor, logprobs: Sequence[TokenLogprob]) -> None:
        """One denoising step: what the network believes of the canvas, and what that means for the user."""
        assert self.canvas is not None
        step = self.canvas.update(belief)
        self.soft = soft
        self.follow(step, self.canvas.over, logprobs)

    def follow(self, step: Step, over: bool, logprobs: Sequence[TokenLogprob] = ()) -> None:
        """What a step that was done, here or elsewhere, means for the user; `over`: it was the canvas's last."""
        canvas = self.canvas
        assert canvas is not None
        self.steps_per_canvas[-1] = step.number
        committed = step.committed[0].tolist()
        committed[: len(self._sent)] = self._sent
        if self.request.drafts:
            self.ticket.put(self._draft(step, committed))
        if over:
            kept, ended = self._until_end(committed)
            self.history += committed
            first, index = len(self._sent), len(self.steps_per_canvas) - 1
            self._sent, self.canvas, self.soft = [], None, None
            self._give(Commit, index, step.number, kept[first:], logprobs[first:], ended)
        elif self._prefix is not None:
            sure = self._prefix.update(step.argmax[0], step.entropies[0])
            kept, _ = self._until_end(committed[:sure])
            canvas.pins[0, : len(kept)] = torch.tensor(kept)
            if len(kept) > len(self._sent):  # less when the canvas is drawn again
                first, self._sent = len(self._sent), kept
                index = len(self.steps_per_canvas) - 1
                self._give(Early, index, step.number, kept[first:], logprobs[first:], False)

    def append(self, token: int, logprobs: Sequence[TokenLogprob]) -> None:
        """One token in autoregressive mode."""
        self.history.append(token)
        kept, ended = self._until_end([token])
        self._give(Commit, 0, 0, kept, logprobs, ended)

    def _give(
        self,
        kind: type[Commit] | type[Early],
        canvas: int,
        steps: int,
        tokens: list[int],
        logprobs: Sequence[TokenLogprob],
        ended: bool,
    ) -> None:
        """Adds tokens to the answer and tells it; `ended`: an end token comes after them."""
        writer = self.writer
        text, thoughts, calls = len(writer.text), len(writer.thoughts), len(writer.calls)
        tokens = tokens[: writer.push(tokens)]
        self.tokens += tokens
        self.logprobs += logprobs[: len(tokens)]
        self.stopped = ended or writer.stopped
        if self.done:
            writer.finish()
        delta = kind(
            canvas=canvas,
            steps=steps,
            tokens=tokens,
            text=writer.text[text:],
            thoughts=writer.thoughts[thoughts:],
            tool_calls=writer.calls[calls:],
            logprobs=tuple(logprobs[: len(tokens)]),
        )
        self.ticket.put(delta)

    def spend(self, seconds: float, encoding: float, tokens: int) -> None:
        """Counts the time of a step that it took part in, and what of it encoded so many tokens."""
        self.seconds += seconds
        self.encoding += encoding
        self.stepping += seconds - encoding
        self.encoded += tokens
        if self.first_text is None and self.writer.text:
            self.first_text = self.seconds

    def finish(self, peak_memory_bytes: int) -> None:
        """Tells the result."""
        steps, writer = sum(self.steps_per_canvas), self.writer
        stats = Stats(
            prompt_tokens=len(self.request.prompt),
            reused_tokens=self.reused,
            new_tokens=len(self.tokens),
            steps_per_canvas=self.steps_per_canvas,
            tokens_per_forward=len(self.tokens) / steps if steps else 0.0,
            tokens_per_second=len(self.tokens) / self.seconds,
            seconds=self.seconds,
            seconds_to_first_text=self.first_text,
            seconds_per_step=self.stepping / steps if steps else 0.0,
            encode_tokens_per_second=self.encoded / self.encoding if self.encoding else 0.0,
            peak_memory_bytes=peak_memory_bytes,
        )
        result = Result(
            text=writer.text,
            thoughts=writer.thoughts or None,
            tool_calls=writer.calls,
            tokens=self.tokens,
            logprobs=tuple(self.logprobs) if self.request.params.logprobs is not None else None,
            finish_reason="stop" if self.stopped else "length",
            seed=self.request.seed,
            stats=stats,
        )
        self.ticket.put(Finish(result=result))

    def _until_end(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Tokens of this canvas that a user gets: up to the first end token or the budget; whether one was met."""
        for place, token in enumerate(tokens[: self.missing]):
            if token in self.ends:
                return tokens[:place], True
        return tokens[: self.missing], False

    def _draft(self, step: Step, committed: list[int]) -> Draft:
        """What a viewer sees of a step."""
        kept, _ = self._until_end(committed)
        before, self._before = self._before, committed
        tokenizer = self.writer.tokenizer
        return Draft(
            canvas=len(self.steps_per_canvas) - 1,
            step=step.number,
            max_steps=self.request.settings.max_denoising_steps,
            tokens=committed,
            text=tokenizer.decode(kept) if tokenizer else "",
            settled=step.accepted[0].tolist(),
            changed=[place >= len(before) or token != before[place] for place, token in enumerate(committed)],
            entropies=step.entropies[0].tolist(),
            mean_entropy=step.entropies[0].mean().item(),
            tokens_per_forward=(len(self.tokens) - len(self._sent) + len(kept)) / sum(self.steps_per_canvas),
        )


def logprobs_of(scores: Tensor, tokens: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` [n] under the network's own scores [n, V], with the `top` likeliest beside."""
    logs = torch.log_softmax(scores, dim=-1)
    chosen = logs.gather(-1, tokens[:, None])[:, 0].tolist()
    values, places = logs.topk(top, dim=-1)
    beside = zip(places.tolist(), values.tolist(), strict=True)
    rows = zip(tokens.tolist(), chosen, beside, strict=True)
    return [TokenLogprob(token=t, logprob=p, top=tuple(zip(*pair, strict=True))) for t, p, pair in rows]
