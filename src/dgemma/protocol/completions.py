"""`/v1/completions`: what a body asks for, and the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..events import Result, TokenLogprob
from . import render
from .ask import Ask
from .call import Answer, Call, Json
from .completions_schema import CompletionRequest
from .errors import invalid
from .sampling import Sampling, sampling
from .served import Served


@dataclass(frozen=True, kw_only=True)
class CompletionCall(Call):
    """Text to go on with."""

    body: CompletionRequest

    @classmethod
    def read(cls, body: CompletionRequest) -> CompletionCall:
        """Checks what fields say together.

        Raises:
            ApiError: names the field that cannot be honoured.
        """
        options = body.stream_options
        ask = Ask(
            prompts=body.prompt,
            sampling=_sampling(body),
            choices=body.n or 1,
            raw=isinstance(body.prompt[0], str),
            drafts=bool(options and options.include_drafts),
        )
        return cls(body=body, ask=ask)

    def begin(self, served: Served) -> CompletionAnswer:
        """See `Call`."""
        return CompletionAnswer(self, served)


class CompletionAnswer(Answer):
    """What goes on from each prompt. Fields: `head`, what every chunk of it begins with."""

    def __init__(self, call: CompletionCall, served: Served):
        super().__init__(call, served)
        self.head: Json = {
            "id": render.new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def whole(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """See `Answer`."""
        choices = [
            self.choice(index, result.text, result.finish_reason, result.thoughts, result.logprobs, 0)
            for index, result in enumerate(results)
        ]
        return {**self.head, "choices": choices, "usage": self.usage(results, prompt_tokens)}

    def choice(
        self,
        index: int,
        text: str,
        reason: str | None,
        thoughts: str | None,
        logprobs: tuple[TokenLogprob, ...] | None,
        offset: int,
    ) -> Json:
        """An answer or a piece of it that begins `offset` characters in."""
        return {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else render.completion_logprobs(logprobs, self.words, offset),
            "finish_reason": reason,
            **({"reasoning_content": thoughts} if thoughts else {}),
        }


def _sampling(body: CompletionRequest) -> Sampling:
    if body.best_of is not None and body.best_of not in (1, body.n):
        raise invalid("best_of", "needs to be n, or left out: every answer that is made is given")
    if body.best_of == 1 and (body.n or 1) > 1:
        raise invalid("best_of", "is less than n")
    if body.stream_options and not body.stream:
        raise invalid("stream_options", "needs stream to be true")
    given = {
        "max_new_tokens": ("max_tokens", body.max_tokens),
        "temperature": ("temperature", body.temperature),
        "top_p": ("top_p", body.top_p),
        "seed": ("seed", body.seed),
        "stop": ("stop", body.stop),
        "logit_bias": ("logit_bias", body.logit_bias),
        "logprobs": ("logprobs", body.logprobs),
    }
    return sampling(given, body.diffusion, prompt="prompt")
