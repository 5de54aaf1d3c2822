"""Parts of an answer as JSON that several endpoints have in common: usage, log-probabilities, tool calls, drafts."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ..events import Draft, Result, TokenLogprob, ToolCall
from .served import Words

LEAST_LOGPROB = -9999.0  # OpenAI's word for impossible: JSON has no infinity


def new_id(kind: str) -> str:
    """A fresh id, such as `chatcmpl-…` or `msg_…`; `kind` brings its own last sign."""
    return kind + uuid.uuid4().hex


def usage(results: Sequence[Result], choices: int, prompt_tokens: int, words: Words) -> dict[str, Any]:
    """What a request was given. Tokens after the end of an answer do not count.

    Args:
        results: of all prompts, as many `choices` for each.
        prompt_tokens: of the request, each prompt counted once.
    """
    completion = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.stats.reused_tokens for result in results[::choices])},
        "completion_tokens_details": {
            "reasoning_tokens": sum(words.count(result.thoughts) for result in results),
            "denoising_steps": sum(sum(result.stats.steps_per_canvas) for result in results),
        },
    }


def chat_logprobs(entries: Sequence[TokenLogprob], words: Words) -> dict[str, Any]:
    """Log-probabilities as a chat has them."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        name, data = words.name(token)
        return {"token": name, "logprob": _finite(logprob), "bytes": data}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(token, logprob) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob], words: Words, offset: int) -> dict[str, Any]:
    """Log-probabilities as `/v1/completions` has them; `offset`: characters before the first token."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(words.text(entry.token))
    return {
        "tokens": [words.name(entry.token)[0] for entry in entries],
        "token_logprobs": [_finite(entry.logprob) for entry in entries],
        "top_logprobs": [{words.name(token)[0]: _finite(logprob) for token, logprob in entry.top} for entry in entries],
        "text_offset": offsets,
    }


def tool_calls(calls: Iterable[ToolCall], first: int | None = None) -> list[dict[str, Any]]:
    """Tool calls as a chat message has them; with `first`, as a stream's delta has them, numbered from it."""
    return [
        {
            **({} if first is None else {"index": first + at}),
            "id": new_id("call_"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for at, call in enumerate(calls)
    ]


def finish_reason(result: Result) -> str:
    """Why an answer ended; "tool_calls" where it ended with calls."""
    return "tool_calls" if result.tool_calls and result.finish_reason == "stop" else result.finish_reason


def draft(event: Draft, choice: int, words: Words) -> dict[str, Any]:
    """The canvas after a step, position by position: what each holds, and whether it is settled."""
    return {
        "choice": choice,
        "canvas": event.canvas,
        "step": event.step,
        "max_steps": event.max_steps,
        "mean_entropy": round(event.mean_entropy, 4),
        "tokens_per_forward": round(event.tokens_per_forward, 2),
        "text": event.text,
        "pieces": [words.text(token) for token in event.tokens],
        "settled": event.settled,
        "changed": event.changed,
        "entropies": [round(entropy, 3) for entropy in event.entropies],
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
