"""Responses that a later one may refer back to: in memory, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..protocol.errors import ApiError
from .stream import to_json


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A response as it was sent, and the conversation up to its end, without instructions."""

    response: Mapping[str, Any]
    conversation: Sequence[Mapping[str, Any]]
    size: int


class Store:
    """At most so many responses, of at most so many bytes together (as JSON)."""

    def __init__(self, *, max_entries: int, max_bytes: int):
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def put(self, response: Mapping[str, Any], conversation: Sequence[Mapping[str, Any]]) -> None:
        """Keeps a response under its id."""
        size = len(to_json(response)) + len(to_json(conversation))
        self._entries[response["id"]] = Stored(response=response, conversation=conversation, size=size)
        self._bytes += size
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].size

    def get(self, name: str, *, param: str | None = None) -> Stored:
        """The response of this id, which is then the last to be forgotten.

        Raises:
            ApiError: 404; it was never kept, or it is forgotten.
        """
        if name not in self._entries:
            where = f"{param}: " if param else ""
            why = "responses are kept in memory: it was not stored, or was forgotten, deleted or lost in a restart"
            raise ApiError(404, f"{where}no response {name[:80]!r}; {why}", param=param, code="response_not_found")
        self._entries.move_to_end(name)
        return self._entries[name]

    def delete(self, name: str) -> None:
        """Forgets a response; errors as `get`."""
        self._bytes -= self.get(name).size
        del self._entries[name]
