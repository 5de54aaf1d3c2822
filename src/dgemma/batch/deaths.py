"""Requests whose worker died: which of them killed it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import WorkerLost
from ..protocol import ApiError
from .answer import SUSPECTS, Outcome, refused
from .form import Form, Refusal
from .source import Record

TRIES = 3  # workers that a request may take with it, the last one alone


class Deaths:
    """Cuts what dead workers had into lots: a request that kills is alone with its last worker, and fails alone.

    Nobody knows which request it was, nor whether it was one at all. A worker that has a lot has nothing beside it.

    Fields:
        held: failures that may be the machines' fault: given out with the next answer, which shows that they work.
    """

    def __init__(self, form: Form):
        self._form = form
        self.held: list[Outcome] = []

    def lots(self, tries: int, records: Sequence[Record], how: str) -> list[tuple[int, list[Record]]]:
        """What is to be tried again, each lot with how many workers it has cost.

        Args:
            tries: what the same was of `records`, before the death.
            how: the worker died, for the errors file.

        Raises:
            WorkerLost: workers have died of one request after another, and nothing was answered in between.
        """
        tries += 1
        if len(records) == 1 and tries >= TRIES:
            self.held.append(self._failed(records[0], how))
            if len(self.held) >= SUSPECTS:
                raise WorkerLost(f"{how}, with {SUSPECTS} requests one after another; was the memory full?")
            return []
        size = 1 if tries >= TRIES - 1 else max(1, math.isqrt(len(records)))
        return [(tries, list(records[at : at + size])) for at in range(0, len(records), size)]

    def answered(self) -> list[Outcome]:
        """An answer has come: the failures before it."""
        held, self.held = self.held, []
        return held

    def _failed(self, record: Record, how: str) -> Outcome:
        error = ApiError(
            500, f"{how} each of the {TRIES} times that it had this request", kind="server_error", code="internal_error"
        )
        try:
            request = self._form.read(record)
        except Refusal as refusal:
            return refused(self._form, refusal)
        answered = request.row is None
        return refused(self._form, Refusal(request.line, request.custom_id, error, answered=answered))
