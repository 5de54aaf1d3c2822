"""What the endpoints share: the model and its state, the settings, the way of a request into the engine."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from starlette.requests import Request

from ..errors import DGemmaError
from ..protocol import Ask, Call, Served, from_engine, read_call
from ..protocol.errors import invalid, unavailable
from ..protocol.responses import Earlier
from .body import read_body
from .data import DataFolder
from .job import Job
from .logs import Record
from .metrics import Metrics
from .runner import BatchRunner
from .settings import ServerSettings
from .store import Store

if TYPE_CHECKING:
    from ..api import Model
    from ..engine import Status, Ticket


class Service:
    """One model behind one port. It is "loading" until it has the model, then "ready", in the end "draining".

    Raises:
        ConfigError: the data folder that the settings name cannot be used.

    Fields:
        state: what of these it is.
        model: there when ready.
        created: when the server started, in seconds since 1970.
        data, batches: files that are kept; what answers those that are batches.
        jobs: requests under way; open_requests: HTTP requests under way, of any kind.
    """

    def __init__(self, settings: ServerSettings):
        self.settings = settings
        self.state = "loading"
        self.model: Model | None = None
        self._served: Served | None = None
        self.created = int(time.time())
        self.metrics = Metrics(self._status)
        self.store = Store(max_entries=settings.max_responses, max_bytes=settings.max_response_bytes)
        self.data = DataFolder(settings.data_dir)
        self.batches = BatchRunner(self.data)
        self.jobs: set[Job] = set()
        self.open_requests = 0
        # Templates and tokenizers take their time over a long prompt; streams go on meanwhile.
        self._submitter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="submit")

    def ready(self, model: Model) -> None:
        """Takes requests from now on."""
        self._served, self.model = Served(model), model
        if self.state == "loading":
            self.batches.start(model)
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

    def served(self) -> Served:
        """What answers say of the model; errors are those of `serving`."""
        self.serving()
        assert self._served is not None
        return self._served

    async def read(self, request: Request, url: str, *, earlier: Earlier | None = None) -> Call:
        """The request, checked; errors are those of `read_body` and `read_call`, and 503 where it would be of no use.

        Args:
            url: of the endpoint.
            earlier: gives the conversation before, by a response's id.
        """
        self.serving()
        settings = self.settings
        body = await read_body(request, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
        call = read_call(url, body, earlier=earlier)
        if call.model is not None:
            self.served().check_name(call.model)
        return call

    async def submit(self, record: Record, ask: Ask) -> Job:
        """Puts a request into the engine's queue, all of its choices or none.

        Raises:
            ApiError: the engine refuses it.
        """
        model, limit = self.serving(), self.settings.max_choices
        if ask.answers > limit:
            raise invalid(ask.sampling.names["prompt"], f"{len(ask.prompts)} times n is more than {limit} answers")
        loop = asyncio.get_running_loop()
        submitted = loop.run_in_executor(self._submitter, ask.submit, model)
        try:
            tickets = await asyncio.shield(submitted)
        except DGemmaError as error:
            raise from_engine(error, ask.sampling.names) from error
        except asyncio.CancelledError:
            submitted.add_done_callback(_cancel_all)
            raise
        job = Job(
            tickets,
            prompt_tokens=ask.prompt_tokens(tickets),
            names=ask.sampling.names,
            record=record,
            seconds=self.settings.request_seconds,
            on_finish=self.metrics.finished,
            on_close=self.jobs.discard,
        )
        self.jobs.add(job)
        return job

    def close(self) -> None:
        """Frees the threads, and the data folder."""
        self._submitter.shutdown(wait=False, cancel_futures=True)
        self.batches.join()
        self.data.close()

    def _status(self) -> Status | None:
        return None if self.model is None else self.model.status()


def _cancel_all(submitted: asyncio.Future[list[Ticket]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for ticket in submitted.result():
            ticket.cancel()
