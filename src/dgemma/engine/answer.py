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

    def push(self, tokens: Sequence[int]) -> str:
        """Takes committed tokens; returns what they add to the answer for certain."""
        if self.decoder is None:
            return ""
        return self._write(self.channels.push(self.decoder.push(tokens)))

    def finish(self) -> str:
        """Returns what was held back."""
        if self.decoder is None or self.stopped:
            return ""
        added = self._write(self.channels.push(self.decoder.finish()))
        added += self._write(self.channels.finish())
        rest = "" if self.stopped else self.stops.finish()
        self.text += rest
        return added + rest

    def _write(self, pieces: tuple[str, str]) -> str:
        thought, text = pieces
        self.thoughts += thought
        emitted, _ = self.stops.push(text)
        self.text += emitted
        return emitted


@dataclass
class Answer:
    """A request under way, and what it has so far. Times are seconds of `time.perf_counter`."""

    network: Network
    tokenizer: Tokenizer | None
    prompt: list[int]
    params: SamplingParams
    settings: GenerationConfig
    seed: int
    think: bool = False
    tokens: list[int] = field(default_factory=list)
    steps_per_canvas: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first_text: float | None = None
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

    def write(self, tokens: list[int]) -> str:
        """Adds committed tokens to the answer -> the text that is certain now."""
        self.tokens += tokens
        added = self.writer.push(tokens)
        if added and self.first_text is None:
            self.first_text = time.perf_counter() - self.started
        return added

    def flush(self) -> str:
        """Ends the text -> what was held back."""
        rest = self.writer.finish()
        if rest and self.first_text is None:
            self.first_text = time.perf_counter() - self.started
        return rest

    def finish(self, stopped: bool) -> Finish:
        """The result of an answer that was flushed."""
        seconds = time.perf_counter() - self.started
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
                finish_reason="stop" if stopped or self.writer.stopped else "length",
                seed=self.seed,
                stats=stats,
            )
        )


@torch.no_grad()
def answer_by_diffusion(answer: Answer) -> Iterator[Event]:
    """Canvas after canvas: encode what is new, settle a canvas, commit it. The last canvas is not encoded."""
    network = answer.network
    cache = network.new_cache()
    draws = CounterDraws([answer.seed], network.device)
    length = canvas_length(network, answer.params)
    fresh, stopped, index = answer.prompt, False, 0
    while answer.missing > 0 and not stopped:
        answer.encode(fresh, cache)
        answer.steps_per_canvas.append(0)
        before: list[int] = []
        started = time.perf_counter()
        for step in settle(network, cache, answer.params, answer.settings, length=length, index=index, draws=draws):
            answer.steps_per_canvas[-1] = step.number
            answer.stepping += time.perf_counter() - started
            draft = _draft(answer, step, before, index)
            before = draft.tokens
            yield draft
            started = time.perf_counter()
        fresh = step.committed[0].tolist()
        kept, stopped = answer.until_end(fresh)
        text = answer.write(kept)
        stopped = stopped or answer.writer.stopped
        if stopped or answer.missing <= 0:
            text += answer.flush()
        yield Commit(canvas=index, steps=step.number, tokens=kept, text=text)
        index += 1
    yield answer.finish(stopped)


@torch.no_grad()
def answer_autoregressively(answer: Answer) -> Iterator[Event]:
    """Token after token on the same weights: encode, the tied head, one sample. A `Commit` a token, of no steps."""
    network, params = answer.network, answer.params
    cache = network.new_cache()
    draws = CounterDraws([answer.seed], network.device)
    ends = torch.tensor(sorted(answer.ends), dtype=torch.int64, device=network.device)
    fresh, stopped = answer.prompt, False
    while answer.missing > 0 and not stopped:
        scores = network.logits(answer.encode(fresh, cache)[:, -1:]) / (params.temperature or 1.0)
        if len(answer.tokens) < params.min_tokens and len(ends):
            scores = refuse(scores, ends, slice(0, 1))
        scores = keep_likely(scores, params.top_k, params.top_p)
        chosen = scores.argmax(dim=-1) if params.temperature == 0 else draws.sample(len(answer.tokens), 0, scores)
        fresh = chosen[0].tolist()
        kept, stopped = answer.until_end(fresh)
        text = answer.write(kept)
        stopped = stopped or answer.writer.stopped
        if stopped or answer.missing <= 0:
            text += answer.flush()
        if kept or text:
            yield Commit(canvas=0, steps=0, tokens=kept, text=text)
    yield answer.finish(stopped)


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
