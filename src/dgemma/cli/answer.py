"""One run from its first event to its last, shown as it goes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import CheckpointError
from ..events import Commit, Delta, Draft, Early, Event, Finish, Result
from ..params import SamplingParams
from . import figures
from .canvas import Decoder, Pieces
from .failures import warn
from .terminal import say, visible
from .views import View


class Model(Protocol):
    """What the commands use of a loaded model (`dgemma.load` returns one; tests bring their own)."""

    @property
    def tokenizer(self) -> Decoder | None: ...

    @property
    def end_token_ids(self) -> Sequence[int]: ...

    def stream(
        self, prompt: Any, params: SamplingParams | None = None, *, think: bool = False, raw: bool = False
    ) -> Iterator[Event]:
        """The events of one run; closing the iterator stops it."""
        ...


@dataclass
class Answer:
    """What came of a run: `result` is None when it was interrupted, `text` is what was shown by then."""

    text: str = ""
    result: Result | None = None
    drafts: list[Draft] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)


def pieces_of(model: Model) -> Pieces:
    """The per-token texts of a model, for drawing its canvases.

    Raises:
        CheckpointError: it has none.
    """
    if model.tokenizer is None:
        raise CheckpointError("tokenizer.json: missing from the model's directory; without it there is no text")
    return Pieces(model.tokenizer, model.end_token_ids)


def run(
    model: Model,
    prompt: str | list[dict[str, Any]],
    params: SamplingParams,
    view: View,
    *,
    think: bool = False,
    raw: bool = False,
    keep_drafts: bool = False,
) -> Answer:
    """Runs the model and shows its events; Ctrl-C ends the run and leaves what was committed."""
    answer = Answer()
    events = model.stream(prompt, params, think=think, raw=raw)
    # Once the result is there the run is complete, interrupted or not.
    with contextlib.suppress(KeyboardInterrupt), view, _closing(events):
        for event in _checked(events):
            if isinstance(event, Draft):
                if keep_drafts:
                    answer.drafts.append(event)
                view.draft(event)
            elif isinstance(event, Early | Commit):
                answer.text += event.text
                answer.deltas.append(event)
                view.early(event) if isinstance(event, Early) else view.commit(event)
            else:
                answer.result = event.result
                # Text that was held back for a stop string which then did not come.
                if event.result.text.startswith(answer.text):
                    view.text(event.result.text[len(answer.text) :])
                    answer.text = event.result.text
    return answer


def report(result: Result, *, stats: bool, brief: bool, think: bool) -> None:
    """What is said on stderr after an answer: thoughts, figures, and a word where the answer is empty."""
    if think and result.thoughts:
        say(f"thoughts: {visible(result.thoughts.strip())}", dim=True)
    if not result.text.strip():
        warn("the model ended its answer before any text; --min-tokens 1 or another --seed may help")
    if stats:
        say("\n".join(figures.table(result)), dim=True)
    elif brief:
        say(figures.brief(result), dim=True)


@contextlib.contextmanager
def _closing(events: Iterator[Event]) -> Iterator[None]:
    """Stops the run when it is left early."""
    try:
        yield
    finally:
        if isinstance(events, Generator):
            events.close()


def _checked(events: Iterable[Event]) -> Iterator[Event]:
    """The events; a run that ends without its Finish is our mistake and not an empty answer."""
    event = None
    for event in events:
        yield event
    assert isinstance(event, Finish), "the run ended without a result"
