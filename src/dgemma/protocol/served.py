"""What answers say of the model that gave them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from .. import __version__
from ..text import Tokenizer
from ..text.tokenizer import BYTE_SHAPE
from .errors import ApiError

if TYPE_CHECKING:
    from ..api import Model


class Words:
    """Tokens as text."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self._text = lru_cache(maxsize=65536)(self._decode)

    def text(self, token: int) -> str:
        """The token's text, control tokens spelled out; U+FFFD for a part of a character."""
        return self._text(token)

    def name(self, token: int) -> tuple[str, list[int] | None]:
        """The token as log-probabilities show it, and its bytes where they are known.

        A part of a character is shown as the vocabulary spells it, since replacement signs all look the same.
        """
        text = self.text(token)
        if self.tokenizer is None or "\ufffd" not in text:
            return text, list(text.encode())
        spelled = self.tokenizer.token_of(token) or text
        return spelled, [int(spelled[3:-1], 16)] if BYTE_SHAPE.fullmatch(spelled) else None

    def count(self, text: str | None) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text, special=False)) if text and self.tokenizer else 0

    def _decode(self, token: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode([token], keep_special=True)


class Served:
    """A model by its name.

    Fields:
        name: what requests call it.
        fingerprint: a name for it and this version of the software.
        words: its tokens as text.
    """

    def __init__(self, model: Model):
        about = f"{__version__} {model.name} {model.config}"
        self.name = model.name
        self.fingerprint = "fp_" + hashlib.sha256(about.encode()).hexdigest()[:12]
        self.words = Words(model.tokenizer)

    def check_name(self, name: str) -> None:
        """Refuses any name but the model's.

        Raises:
            ApiError: 404.
        """
        if name != self.name:
            message = f"model: {name[:200]!r} is not served here; it is {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
