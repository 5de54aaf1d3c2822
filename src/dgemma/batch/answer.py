"""Requests to answers: the part of a run that every machine does alike."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine import Flights
from ..errors import CapacityError, ConfigError, DGemmaError
from ..events import Result
from ..params import SamplingParams
from ..protocol import ApiError, Served, from_engine
from .form import Form, Refusal, Request
from .source import Record
from .tables import plain

if TYPE_CHECKING:
    from ..api import Model
    from ..engine import Ticket

log = logging.getLogger(__name__)
AHEAD = 4  # times what runs at once: requests that are in line, so that none is missing when one is done
RETRY_SECONDS = 0.05  # between two tries at a line that others have filled
SUSPECTS = 16  # failures one after another, each of which nobody has foreseen


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one line.

    Fields:
        ok: whether it has an answer; otherwise `data` is for the errors file.
        data: one JSON line.
        tokens, prompt_tokens, forwards: given, read, denoising steps.
    """

    line: int
    ok: bool
    data: bytes
    tokens: int = 0
    prompt_tokens: int = 0
    forwards: int = 0


class Answerer:
    """Puts requests into a model's engine and makes lines of what comes out, whichever is done first.

    Args:
        ahead: answers under way at most; None for four times what runs at once.
    """

    def __init__(self, model: Model, form: Form, ahead: int | None = None):
        self.model, self.form = model, form
        self._served = Served(model)
        settings = model.engine.settings
        self._most = settings.max_batch + settings.max_queue
        self.ahead = min(ahead or AHEAD * settings.max_batch, self._most)
        self._flights: Flights[tuple[Request, Sequence[Ticket]]] = Flights()
        self._suspects: list[tuple[Outcome, Exception]] = []
        self._ready: list[Outcome] = []
        self._parked: Request | None = None  # for which the engine's line has had no room

    def __len__(self) -> int:
        return len(self._flights) + len(self._ready) + (self._parked is not None)

    @property
    def held(self) -> int:
        """Failures of which nobody knows yet whose fault they are; `rest` gives them out."""
        return len(self._suspects)

    @property
    def full(self) -> bool:
        """Whether there is enough to do, or no room in the engine's line for more."""
        most = self._flights.tickets >= self.ahead or len(self._flights) >= self.ahead
        return most or self._parked is not None

    def submit(self, request: Request) -> None:
        """Takes a request. While the engine's line is full of others' requests it is kept, and `full` holds.

        Raises:
            Draining: the engine takes no more.
        """
        assert self._parked is None
        ask = request.call.ask
        tickets: list[Ticket] = []

        def start() -> list[Ticket]:
            if ask.answers > self._most:
                raise CapacityError(f"n: {ask.answers} answers are more than the engine's line holds")
            tickets[:] = ask.submit(self.model)
            return tickets

        if not self._flights.submit((request, tickets), start, wait=False):
            self._parked = request

    def take(self, record: Record) -> None:
        """Takes a request that nobody has read yet; `next` tells what is wrong with it."""
        try:
            self.submit(self.form.read(record))
        except Refusal as refusal:
            self._ready.append(refused(self.form, refusal))

    def next(self, timeout: float | None = None) -> Outcome | None:
        """What became of the next request that is done; None after so many seconds, or if there is none.

        Raises:
            Exception: the engine has failed, again and again.
        """
        if self._ready:
            return self._ready.pop()
        parked, self._parked = self._parked, None
        if parked is not None:
            self.submit(parked)
        if self._parked is not None:
            timeout = RETRY_SECONDS
            if not len(self._flights):
                time.sleep(timeout)
        done = self._flights.next(timeout)
        if done is None:
            return None
        (request, tickets), results = done
        if isinstance(results, DGemmaError):
            names = request.call.ask.sampling.names
            error = from_engine(results, names, running=bool(tickets))
            return refused(self.form, Refusal(request.line, request.custom_id, error, answered=request.row is None))
        if isinstance(results, Exception):
            return self._suspect(request, results)
        # The engine works: what failed before did so by itself.
        self._ready += [outcome for outcome, _ in self._suspects]
        self._suspects.clear()
        return answered(self.form, request, results, request.call.ask.prompt_tokens(tickets), self._served)

    def rest(self) -> list[Outcome]:
        """When all is done: what is still held back."""
        rest = self._ready + [outcome for outcome, _ in self._suspects]
        self._ready, self._suspects = [], []
        return rest

    def answer(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """The outcomes of all records, as they are done: for a block of them."""
        for record in records:
            while self.full:
                outcome = self.next()
                if outcome is not None:
                    yield outcome
            self.take(record)
        while len(self):
            outcome = self.next()
            if outcome is not None:
                yield outcome
        yield from self.rest()

    def close(self) -> None:
        """Ends what is under way."""
        self._flights.cancel()

    def _suspect(self, request: Request, error: Exception) -> Outcome | None:
        """An error that nobody foresaw: this request's own, if others go well after it; the engine's, if none does."""
        log.warning("line %d: %s: %s", request.line, type(error).__name__, error)
        told = ApiError(500, f"the engine failed ({type(error).__name__})", kind="server_error", code="internal_error")
        outcome = refused(self.form, Refusal(request.line, request.custom_id, told, answered=request.row is None))
        self._suspects.append((outcome, error))
        if len(self._suspects) >= SUSPECTS:
            raise error
        return None


def answered(form: Form, request: Request, results: Sequence[Result], prompt_tokens: int, served: Served) -> Outcome:
    """An answer as the output has it."""
    if request.row is None:
        name = form.id_of(request.line)
        body = request.call.answer(results, prompt_tokens, served)
        response = {"status_code": 200, "request_id": name.replace("batch_", "", 1), "body": body}
        line: dict[str, Any] = {"id": name, "custom_id": request.custom_id, "response": response, "error": None}
    else:
        result = results[0]
        figures = [
            request.line,
            result.text,
            result.finish_reason,
            prompt_tokens,
            len(result.tokens),
            result.seed,
            result.thoughts,
        ]
        line = {**request.row, **dict(zip(form.answer_columns, figures, strict=False))}
    return Outcome(
        line=request.line,
        ok=True,
        data=as_line(line),
        tokens=sum(len(result.tokens) for result in results),
        prompt_tokens=prompt_tokens,
        forwards=sum(sum(result.stats.steps_per_canvas) for result in results),
    )


def refused(form: Form, refusal: Refusal) -> Outcome:
    """A line for the errors file: the output's form, and the number of the line."""
    error, name = refusal.error, form.id_of(refusal.line)
    line: dict[str, Any] = {"id": name, "custom_id": refusal.custom_id, "line": refusal.line}
    if refusal.answered:
        request_id = name.replace("batch_", "", 1)
        line["response"] = {"status_code": error.status, "request_id": request_id, "body": error.body()}
        line["error"] = None
    else:
        line["response"] = None
        line["error"] = {"code": error.code, "message": error.message, "param": error.param}
    return Outcome(line=refusal.line, ok=False, data=as_line(line))


def as_line(value: dict[str, Any]) -> bytes:
    """A JSON line."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # a table's values
        text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def try_defaults(model: Model, form: Form) -> None:
    """Lets the model check the settings that all requests have, before each of them is refused for the same reason.

    Raises:
        ConfigError: the model cannot honour them.
    """
    if form.defaults:
        params = {name: value for name, value in form.defaults.items() if name != "logit_bias"}
        bias = {int(token): value for token, value in form.defaults.get("logit_bias", {}).items()}
        try:
            model.submit([0], SamplingParams(**params, logit_bias=bias)).cancel()
        except DGemmaError as error:
            raise ConfigError(re.sub(r"^prompt: 1 tokens and ", "", str(error))) from None
