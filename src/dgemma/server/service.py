"""What the endpoints share: the model and its state, the settings, the way of a request into the engine."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from .. import __version__
from ..errors import DGemmaError
from .body import Form, read_body
from .errors import ApiError, from_engine, invalid, unavailable
from .job import Job
from .logs import Record
from .metrics import Metrics
from .render import Words
from .sampling import Sampling
from .settings import ServerSettings
from .store import Store

if TYPE_CHECKING:
    from ..api import Model, Prompt
    from ..engine import Status, Ticket


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What the engine is asked for: `choices` answers to each prompt, in the prompts' order."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    choices: int = 1
    think: bool = False
    raw: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    drafts: bool = False


class Service:
    """One model behind one port. It is "loading" until it has the model, then "ready", in the end "draining".

    Fields:
        state: what of these it is.
        model: there when ready.
        created: when the server started, in seconds since 1970.
        name, words, fingerprint: the model's name, its tokens as text, and a name for it and this version.
        jobs: requests under way; open_requests: HTTP requests under way, of any kind.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.state = "loading"
        self.model: Model | None = None
        self.name, self.words, self.fingerprint = "", Words(None), ""
        self.created = int(time.time())
        self.metrics = Metrics(self._status)
        self.store = Store(max_entries=settings.max_responses, max_bytes=settings.max_response_bytes)
        self.jobs: set[Job] = set()
        self.open_requests = 0
        # Templates and tokenizers take their time over a long prompt; streams go on meanwhile.
        self._submitter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="submit")

    def ready(self, model: Model) -> None:
        """Takes requests from now on."""
        self.name = model.name
        about = f"{__version__} {model.name} {model.config}"
        self.fingerprint = "fp_" + hashlib.sha256(about.encode()).hexdigest()[:12]
        self.words = Words(model.tokenizer)
        self.model = model
        if self.state == "loading":
            self.state = "ready"

    def serving(self) -> Model:
        """The model.

        Raises:
            ApiError: 503 while there is none, or when no more requests are taken.
        """
        if self.state == "draining":
            raise unavailable("the server is shutting down and takes no new requests", "draining")
        if self.model is None:
            raise unavailable("the model is still being loaded", "loading")
        return self.model

    async def read(self, request: Request, form: type[Form]) -> Form:
        """The request's body; errors are those of `read_body`, and 503 where the body would be of no use."""
        self.serving()
        settings = self.settings
        return await read_body(request, form, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)

    def check_model(self, name: str) -> None:
        """Refuses any name but the model's.

        Raises:
            ApiError: 404.
        """
        own = self.serving().name
        if name != own:
            message = f"model: {name[:200]!r} is not served here; it is {own!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def submit(self, record: Record, ask: Ask) -> Job:
        """Puts a request into the engine's queue, all of its choices or none.

        Raises:
            ApiError: the engine refuses it.
        """
        model, limit = self.serving(), self.settings.max_choices
        if len(ask.prompts) * ask.choices > limit:
            raise invalid(ask.sampling.names["prompt"], f"{len(ask.prompts)} times n is more than {limit} answers")
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(self._submitter, _submit_all, model, ask)
        try:
            tickets = await asyncio.shield(submitted)
        except DGemmaError as error:
            raise from_engine(error, ask.sampling.names) from error
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_all)
            raise
        job = Job(
            tickets,
            prompt_tokens=sum(ticket.prompt_tokens for ticket in tickets[:: ask.choices]),
            names=ask.sampling.names,
            record=record,
            seconds=self.settings.request_seconds,
            on_finish=self.metrics.finished,
            on_close=self.jobs.discard,
        )
        self.jobs.add(job)
        return job

    def close(self) -> None:
        """Frees the thread."""
        self._submitter.shutdown(wait=False, cancel_futures=True)

    def _status(self) -> Status | None:
        return None if self.model is None else self.model.status()


def _submit_all(model: Model, ask: Ask) -> list[Ticket]:
    tickets: list[Ticket] = []
    try:
        for prompt in ask.prompts:
            for index in range(ask.choices):
                params = ask.sampling.choice(index)
                tickets.append(
                    model.submit(prompt, params, think=ask.think, raw=ask.raw, tools=ask.tools, drafts=ask.drafts)
                )
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


def _cancel_all(submitted: asyncio.Future[list[Ticket]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for ticket in submitted.result():
            ticket.cancel()
