"""Text to token ids and back, with the control tokens kept apart from what people write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from ..errors import CheckpointError, RequestError

FILE = "tokenizer.json"
# `<|turn>`, `<turn|>`, `<|"|>`: control tokens by their looks, for files that do not mark all of them as special.
_CONTROL_SHAPE = re.compile(r"<\|[^\s<>]+>|<[^\s<>]+\|>")
BYTE_SHAPE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # one byte of a character that has no token: text, however marked


class Tokenizer:
    """A checkpoint's `tokenizer.json`.

    Control tokens (turn and channel marks, begin, end, images) steer the model, so who may write them matters. They
    are the added tokens that the file marks as special, and those that look like `<|name>` or `<name|>`.
    `encode(text)` parses them where the text spells them out: right for a rendered chat template and for raw prompts
    that their author controls. `encode(text, special=False)` never gives one: right for anything a stranger wrote,
    which can then say `<turn|>` without ending the turn. It decodes to the same text either way.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._literal: tokenizers.Tokenizer | None = None
        added = inner.get_added_tokens_decoder()
        self._special = {
            token_id
            for token_id, token in added.items()
            if _CONTROL_SHAPE.fullmatch(token.content) or (token.special and not BYTE_SHAPE.fullmatch(token.content))
        }
        # An unknown character may become the unknown token: that is the text's right, and steers nothing.
        unknown = getattr(inner.model, "unk_token", None)
        self._controls = {i: added[i].content for i in sorted(self._special) if added[i].content != unknown}

    @classmethod
    def read(cls, directory: Path) -> Tokenizer | None:
        """Reads `tokenizer.json`; None where the directory has none (the model then works with token ids).

        Raises:
            CheckpointError: the file is damaged; the message names it.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            return None
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: no usable tokenizer ({' '.join(str(error).split())})") from None

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def controls(self) -> tuple[str, ...]:
        """The control tokens' texts."""
        return tuple(self._controls.values())

    def id_of(self, token: str) -> int | None:
        """The id of exactly this token; None where there's no such token."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    def token_of(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (not as text); None for an id beyond the vocabulary."""
        found = self._inner.id_to_token(token_id) if token_id >= 0 else None
        return None if found is None else str(found)

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's ids; nothing (such as a begin token) is put before or after.

        Args:
            text: any text without lone surrogates.
            special: whether control tokens that the text spells out become control tokens; see the class.

        Raises:
            RequestError: the text cannot be encoded.
        """
        ids = self._encode(self._inner, text)
        if special or self._controls.keys().isdisjoint(ids):
            return ids
        if self._literal is None:
            self._literal = self._without_controls()
        ids = self._encode(self._literal, text)
        if self._controls.keys().isdisjoint(ids):
            return ids
        # The model itself holds control tokens as whole words: only broken up do they stay text.
        ids = [token for character in text for token in self._encode(self._literal, character)]
        if not self._controls.keys().isdisjoint(ids):
            raise RequestError("the text cannot be encoded without control tokens")
        return ids

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of the ids. Control tokens are left out, or spelled out with `keep_special`.

        Ids beyond the vocabulary have no text.

        Raises:
            RequestError: an id is negative or absurdly large.
        """
        kept = self.textual(ids, keep_special=keep_special)
        return str(self._inner.decode(kept, skip_special_tokens=False))

    def textual(self, ids: Iterable[int], *, keep_special: bool = False) -> list[int]:
        """The ids that `decode` turns into text."""
        result = []
        for token in ids:
            if not 0 <= token < 2**32:
                raise RequestError(f"{token}: not a token id")
            if (keep_special or token not in self._special) and self._inner.id_to_token(token) is not None:
                result.append(token)
        return result

    def _without_controls(self) -> tokenizers.Tokenizer:
        """A second tokenizer that takes control tokens in a text as text. Built when first needed: it takes memory."""
        literal = tokenizers.Tokenizer.from_str(self._inner.to_str())
        literal.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in self.controls])
        literal.encode_special_tokens = True
        return literal

    @staticmethod
    def _encode(inner: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            ids: Sequence[int] = inner.encode(text, add_special_tokens=False).ids
        except Exception as error:  # UnicodeEncodeError, TypeError and the library's own plain Exception
            raise RequestError(f"the text cannot be encoded ({' '.join(str(error).split())})") from None
        return list(ids)


def read_tokenizer_config(directory: Path) -> dict[str, object]:
    """The content of `tokenizer_config.json`; empty where there's none.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    path = Path(directory) / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return data
