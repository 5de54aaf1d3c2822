"""A request as it was checked, and the answer to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..events import Result
from . import render
from .ask import Ask
from .served import Served

Json = dict[str, Any]


class Answer(ABC):
    """The answer to one request, which may still be in the making.

    Fields:
        call: the request; words: the model's tokens as text.
    """

    def __init__(self, call: Call, served: Served):
        self.call, self.words = call, served.words

    @abstractmethod
    def whole(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """The body of the response, where it is not a stream.

        Args:
            results: in the order of the tickets.
            prompt_tokens: of the request, each prompt counted once.
        """

    def usage(self, results: Sequence[Result], prompt_tokens: int) -> Json:
        """What the request took and was given."""
        return render.usage(results, self.call.ask.choices, prompt_tokens, self.words)


@dataclass(frozen=True, kw_only=True)
class Call(ABC):
    """A request as an endpoint takes it.

    Fields:
        body: as it was checked.
        ask: what it asks of the engine.
    """

    body: Any
    ask: Ask

    @property
    def model(self) -> str | None:
        """The model's name in the request; None (in `/v1/responses` alone) where it gives none."""
        name: str | None = self.body.model
        return name

    @property
    def stream(self) -> bool:
        """Whether the answer is wanted as a stream."""
        return bool(self.body.stream)

    def with_seed(self, seed: int) -> Call:
        """The same with this seed, where the request gives none."""
        sampling = self.ask.sampling
        if sampling.params.seed is not None:
            return self
        params = replace(sampling.params, seed=seed)
        return replace(self, ask=replace(self.ask, sampling=replace(sampling, params=params)))

    @abstractmethod
    def begin(self, served: Served) -> Answer:
        """An answer with its id and its time, before anything else is known of it."""

    def answer(self, results: Sequence[Result], prompt_tokens: int, served: Served) -> Json:
        """The whole body of the response.

        Args:
            results: in the order of the tickets.
            prompt_tokens: as `ask.prompt_tokens` counts them.
        """
        return self.begin(served).whole(results, prompt_tokens)
