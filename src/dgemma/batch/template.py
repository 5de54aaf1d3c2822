"""Prompts made of a row's columns: `Translate: {text}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, RequestError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+")


class Template:
    """Text with `{column}` in it; `{{` and `}}` are braces. Nothing else is special.

    Raises:
        ConfigError: a brace stands alone, or there is no column.
    """

    def __init__(self, text: str):
        self.text = text
        self._pieces: list[tuple[str, str | None]] = []  # text, or a column's name
        for match in _PIECE.finditer(text):
            piece = match[0]
            if piece in "{}":
                raise ConfigError(
                    f"template: a lone {piece} at character {match.start() + 1}; {piece}{piece} is a brace"
                )
            self._pieces.append((piece[0] if piece in ("{{", "}}") else piece, match[1]))
        self.columns = tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))
        if not self.columns:
            raise ConfigError("template: names no column, so that every prompt would be the same; write {column}")

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of a row.

        Raises:
            RequestError: it lacks a column, or has null there.
        """
        return "".join(text if name is None else as_text(row, name) for text, name in self._pieces)


def as_text(row: Mapping[str, Any], name: str) -> str:
    """A column's value as text: what is no text already as JSON.

    Raises:
        RequestError: it is missing or null.
    """
    if name not in row:
        raise RequestError(f"{name}: no such column in this row")
    value = row[name]
    if value is None:
        raise RequestError(f"{name}: is null")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
