"""Bodies of requests: parsed strictly, checked against a schema."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError

from ..params import SamplingParams
from .errors import ApiError, invalid
from .fields import Body

Form = TypeVar("Form", bound=Body)
MAX_DEPTH = 64  # of nested lists and objects: a tool's JSON Schema has about ten
MAX_DIGITS = 400


def parse(data: bytes) -> Any:
    """JSON by the letter: UTF-8, no NaN, no number beyond a double, no key twice, no lone surrogates, not too deep.

    Raises:
        ApiError: it is something else.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 (byte {error.start + 1})", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is not valid JSON ({error.msg}, {where})", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON ({error})", code="invalid_json") from None
    _walk(value)
    return value


def check(value: Any, form: type[Form]) -> Form:
    """The parsed body as `form`.

    Raises:
        ApiError: names the first field that is wrong.
    """
    if not isinstance(value, dict):
        raise ApiError(400, "the body needs to be a JSON object", code="invalid_type")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    # A field that nobody knows is the clearest thing to say: it may be why another one is missing.
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((one for one in found if one["type"] == "extra_forbidden" and len(one["loc"]) == 1), found[0])
    kind, param = first["type"], spell(first["loc"])
    if kind == "missing":
        return invalid(param, "is missing", "missing_required_parameter")
    if kind == "extra_forbidden":
        hint = "; it goes into `diffusion`" if param in SamplingParams.__dataclass_fields__ else ""
        return invalid(param, f"is not known{hint}", "unknown_parameter")
    if kind == "invalid_role":
        param += ".role"
    if kind == "invalid_item":
        param += ".type"
    message = re.sub(r"^\w+ should", "needs to", first["msg"]).replace(" after validation", "")
    code = kind if kind == "unsupported_value" else "invalid_type" if kind.endswith("_type") else "invalid_value"
    return invalid(param, message, code)


def spell(place: Iterable[str | int]) -> str:
    """`messages[0].content` for a place in a body; names that begin with `~` are our own and no part of it."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("~") and part != "[key]":
            text += f".{part[:64]}" if text else part[:64]
    return text


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number is too large")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise invalid(twice[:64].encode("utf-8", "replace").decode(), "is given twice")
    return value


def _walk(value: Any) -> None:
    """Refuses depth and text that is no Unicode, without recursion."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", code="invalid_json")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, str) and not _is_text(one):
                raise ApiError(400, "the body holds half a surrogate pair, which is no text", code="invalid_json")
        level = [one for one in below if isinstance(one, str | dict | list)]


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
