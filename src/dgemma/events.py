"""What a running generation says as it goes: a draft a step, a commit a canvas, one finish; and the result."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The canvas after one denoising step.

    Fields:
        canvas: number of the canvas, from 0.
        step: steps done on this canvas, from 1.
        max_steps: steps this canvas may take.
        tokens: the argmax of each position [L]; this is what would be committed now.
        text: `tokens` up to the first end token, decoded.
        settled: per position, whether the sampler accepted it in this step [L]; the others are noise again.
        changed: per position, whether its argmax differs from the step before [L].
        entropies: nats a position [L].
        mean_entropy: nats over the canvas.
        tokens_per_forward: tokens that a commit now would give the user, over all steps so far.
    """

    canvas: int
    step: int
    max_steps: int
    tokens: list[int]
    text: str
    settled: list[bool]
    changed: list[bool]
    entropies: list[float]
    mean_entropy: float
    tokens_per_forward: float


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A function that the model asks to be called; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A token of the answer, its log-probability (nats), and the likeliest tokens of its place with theirs.

    The scores are the network's own, before temperature and every other restriction. Of a canvas they are those of
    its last step.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What an answer grows by.

    Fields:
        canvas, steps: number of the canvas it is from, and the steps that this canvas has taken.
        tokens: ids that the user gets, trimmed at the end token and the budget.
        text, thoughts: what is certain now of the answer and of the thought channel.
        tool_calls: calls that are complete now.
        logprobs: one a token where they were asked for.
    """

    canvas: int
    steps: int
    tokens: list[int]
    text: str
    thoughts: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Early(Delta):
    """The first tokens of a canvas that is not finished; they will not change (`SamplingParams.early_text`)."""


@dataclass(frozen=True, kw_only=True)
class Commit(Delta):
    """A finished canvas (in autoregressive mode a token): what it adds to what was sent early."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Figures of one request. Tokens trimmed after the end token never count, nor does time the caller takes.

    `reused_tokens` are those of the prompt that another request had encoded before.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    steps_per_canvas: list[int] = field(default_factory=list)
    tokens_per_forward: float = 0.0
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    seconds_to_first_text: float | None = None
    seconds_per_step: float = 0.0
    encode_tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """One answer.

    Fields:
        text: the answer without thoughts and end marks.
        thoughts: what the model wrote in its thought channel, or None.
        tool_calls: functions that the model asks to be called, in order.
        logprobs: one a token where they were asked for, else None.
        tokens: ids of the whole answer, end token left out; those of a stop string are the last.
        finish_reason: "stop" (end token or stop string) or "length".
        seed: the seed that reproduces it.
        stats: see `Stats`.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    stats: Stats
    thoughts: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The last event of a generation."""

    result: Result


Event = Draft | Early | Commit | Finish
