"""One request from its prompt's ids to its answer: canvases settle one after another, text comes out as it is sure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..diffusion import CounterDraws, Step, settle
from ..diffusion.generate import canvas_length, check_tokens
from ..diffusion.sampling import keep_likely, refuse
from ..errors import CapacityError
from ..events import Commit, Draft, Event, Finish, Result, Stats
from ..memory import peak_memory_bytes
from ..model import Cache, Network
from ..params import GenerationConfig, SamplingParams
from ..text import ChannelSplitter, StopStrings, StreamDecoder, Tokenizer

PREFILL_CHUNK = 2048  # prompt tokens encoded at once: bounds the attention mask's memory


class Writer:
    """The text side of an answer: decodes committed tokens, splits thoughts off, watches for stop strings."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], *, think: bool):
        self.tokenizer = tokenizer
        self.decoder = StreamDecoder(tokenizer, keep_special=True) if tokenizer else None
        self.channels = ChannelSplitter(think=think, strip=tokenizer.controls if tokenizer else ())
        self.stops = StopStrings(stops)
        self.text, self.thoughts = "", ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self.stops.stopped

    def push(self, tokens: Sequence[int]) -> None:
        """Takes committed tokens; `text` and `thoughts` grow by what is certain."""
        if self.decoder is not None:
            self._write(self.channels.push(self.decoder.push(tokens)))

    def finish(self) -> None:
        """The answer has ended: what was held back is written."""
        if self.decoder is None or self.stopped:
            return
        self._write(self.channels.push(self.decoder.finish()))
        self._write(self.channels.finish())
        if not self.stopped:
            self.text += self.stops.finish()

    def _write(self, pieces: tuple[str, str]) -> None:
        if not self.stopped:
            self.thoughts += pieces[0]
            self.text += self.stops.push(pieces[1])[0]


class Clock:
    """Counts the time between `start` and `stop`: what the caller does between two events is not ours."""

    def __init__(self) -> None:
        self._counted, self._since = 0.0, time.perf_counter()

    def start(self) -> None:
        """Goes on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Pauses."""
        self._counted = self.seconds

    @property
    def seconds(self) -> float:
        """Time counted so far, while running."""
        return self._counted + time.perf_counter() - self._since


@dataclass
class Answer:
    """A request under way, and what it has so far. Times are in seconds."""

    network: Network
    tokenizer: Tokenizer | None
    prompt: list[int]
    params: SamplingParams
    settings: GenerationConfig
    seed: int
    think: bool = False
    tokens: list[int] = field(default_factory=list)
    steps_per_canvas: list[int] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    first_text: float | None = None
    stopped: bool = False
    encoding: float = 0.0
    encoded: int = 0
    stepping: float = 0.0

    def __post_init__(self) -> None:
        self.ends = frozenset((*self.settings.eos_token_ids, *self.params.stop_token_ids))
        self.writer = Writer(self.tokenizer, self.params.stop, think=self.think)

    @property
    def steps(self) -> int:
        """Denoising steps so far."""
        return sum(self.steps_per_canvas)

    @property
    def missing(self) -> int:
        """Tokens that the answer may still get."""
        return self.settings.max_new_tokens - len(self.tokens)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.stopped or self.missing <= 0

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
            RequestError: a token id or the canvas length is outside the model's range.
            CapacityError: prompt and answer exceed the context.
        """
        check_tokens(self.network, torch.tensor([self.prompt]))
        canvas_length(self.network, self.params)
        limit = self.network.config.max_position_embeddings
        if len(self.prompt) + self.settings.max_new_tokens > limit:
            raise CapacityError(
                f"prompt: {len(self.prompt)} tokens and max_new_tokens {self.settings.max_new_tokens} exceed the "
                f"model's context of {limit}"
            )

    def until_end(self, tokens: Sequence[int]) -> tuple[list[int], bool]:
        """The tokens that a user gets: up to the first end token or the budget; and whether an end token was met."""
        for place, token in enumerate(tokens[: self.missing]):
            if token in self.ends:
                return list(tokens[:place]), True
        return list(tokens[: self.missing]), False

    def encode(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Encodes in chunks -> the last chunk's hidden states [1, S, H]."""
        started = time.perf_counter()
        rows = torch.tensor([list(tokens)], device=self.network.device)
        for chunk in rows.split(PREFILL_CHUNK, dim=1):
            hidden = self.network.encode(chunk, cache)
        self.encoding += time.perf_counter() - started
        self.encoded += len(tokens)
        return hidden

    def commit(self, canvas: int, steps: int, tokens: list[int], ended: bool) -> Commit:
        """Adds committed tokens; `ended`: an end token came after them."""
        text, thoughts = len(self.writer.text), len(self.writer.thoughts)
        self.tokens += tokens
        self.writer.push(tokens)
        self.stopped = ended or self.writer.stopped
        if self.done:
            self.writer.finish()
        if self.first_text is None and len(self.writer.text) > text:
            self.first_text = self.clock.seconds
        return Commit(
            canvas=canvas,
            steps=steps,
            tokens=tokens,
            text=self.writer.text[text:],
            thoughts=self.writer.thoughts[thoughts:],
        )

    def finish(self) -> Finish:
        """The result."""
        seconds = self.clock.seconds
        steps = self.steps
        stats = Stats(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.tokens),
            steps_per_canvas=self.steps_per_canvas,
            tokens_per_forward=len(self.tokens) / steps if steps else 0.0,
            tokens_per_second=len(self.tokens) / seconds,
            seconds=seconds,
            seconds_to_first_text=self.first_text,
            seconds_per_step=self.stepping / steps if steps else 0.0,
            encode_tokens_per_second=self.encoded / self.encoding if self.encoding else 0.0,
            peak_memory_bytes=_peak(self.network.device),
        )
        return Finish(
            result=Result(
                text=self.writer.text,
                thoughts=self.writer.thoughts or None,
                tokens=self.tokens,
                finish_reason="stop" if self.stopped else "length",
                seed=self.seed,
                stats=stats,
            )
        )


def run(answer: Answer) -> Iterator[Event]:
    """The events of a request: its drafts and commits as they come, then the `Finish`."""
    answer.clock.start()
    way = by_diffusion if answer.params.mode == "diffusion" else autoregressively
    for event in way(answer):
        answer.clock.stop()
        yield event
        answer.clock.start()
    yield answer.finish()


@torch.no_grad()
def by_diffusion(answer: Answer) -> Iterator[Event]:
    """Canvas after canvas: encode what is new, settle a canvas, commit it. The last canvas is not encoded."""
    network = answer.network
    cache = network.new_cache()
    draws = CounterDraws([answer.seed], network.device)
    whole = canvas_length(network, answer.params)
    fresh, index = answer.prompt, 0
    while not answer.done:
        answer.encode(fresh, cache)
        length = min(whole, network.config.max_position_embeddings - cache.length)  # the context's last canvas is short
        answer.steps_per_canvas.append(0)
        before: list[int] = []
        started = answer.clock.seconds
        for step in settle(network, cache, answer.params, answer.settings, length=length, index=index, draws=draws):
            answer.steps_per_canvas[-1] = step.number
            answer.stepping += answer.clock.seconds - started
            draft = _draft(answer, step, before, index)
            before = draft.tokens
            yield draft
            started = answer.clock.seconds
        fresh = step.committed[0].tolist()
        yield answer.commit(index, step.number, *answer.until_end(fresh))
        index += 1


@torch.no_grad()
def autoregressively(answer: Answer) -> Iterator[Event]:
    """Token after token on the same weights: encode, the tied head, one sample. A `Commit` a token, of no steps."""
    network, params = answer.network, answer.params
    cache = network.new_cache()
    draws = CounterDraws([answer.seed], network.device)
    ends = torch.tensor(sorted(answer.ends), dtype=torch.int64, device=network.device)
    fresh = answer.prompt
    while not answer.done:
        scores = network.logits(answer.encode(fresh, cache)[:, -1:]) / (params.temperature or 1.0)
        if len(answer.tokens) < params.min_tokens and len(ends):
            scores = refuse(scores, ends, slice(0, 1))
        scores = keep_likely(scores, params.top_k, params.top_p)
        chosen = scores.argmax(dim=-1) if params.temperature == 0 else draws.sample(len(answer.tokens), 0, scores)
        fresh = chosen[0].tolist()
        yield answer.commit(0, 0, *answer.until_end(fresh))


def _draft(answer: Answer, step: Step, before: list[int], index: int) -> Draft:
    """What a viewer sees of a step."""
    tokens = step.committed[0].tolist()
    kept, _ = answer.until_end(tokens)
    return Draft(
        canvas=index,
        step=step.number,
        max_steps=answer.settings.max_denoising_steps,
        tokens=tokens,
        text=answer.tokenizer.decode(kept) if answer.tokenizer else "",
        settled=step.accepted[0].tolist(),
        changed=[place >= len(before) or token != before[place] for place, token in enumerate(tokens)],
        entropies=step.entropies[0].tolist(),
        mean_entropy=step.entropies[0].mean().item(),
        tokens_per_forward=(len(answer.tokens) + len(kept)) / answer.steps,
    )


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
