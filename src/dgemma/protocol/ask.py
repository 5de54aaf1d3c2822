"""What a request asks of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .sampling import Sampling

if TYPE_CHECKING:
    from ..api import Model, Prompt
    from ..engine import Ticket


@dataclass(frozen=True, kw_only=True)
class Ask:
    """`choices` answers to each prompt, in the prompts' order.

    Fields:
        sampling: settings, and how the request spells them.
        think: whether the model may think; raw: whether text is continued as it is.
        tools: functions that the model may call.
        drafts: whether every denoising step is told.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    choices: int = 1
    think: bool = False
    raw: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    drafts: bool = False

    @property
    def answers(self) -> int:
        """How many answers that makes."""
        return len(self.prompts) * self.choices

    def submit(self, model: Model) -> list[Ticket]:
        """Puts everything into the engine's line, prompt by prompt and choice by choice: all of it or nothing.

        Raises:
            DGemmaError: the engine refuses it; `from_engine` says it in the request's words.
        """
        tickets: list[Ticket] = []
        try:
            for prompt in self.prompts:
                for index in range(self.choices):
                    params = self.sampling.choice(index)
                    tickets.append(
                        model.submit(
                            prompt, params, think=self.think, raw=self.raw, tools=self.tools, drafts=self.drafts
                        )
                    )
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def prompt_tokens(self, tickets: Sequence[Ticket]) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(ticket.prompt_tokens for ticket in tickets[:: self.choices])
