"""Query strings of lists, checked as strictly as bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from ..protocol.errors import invalid

Json = dict[str, Any]


def read_query(request: Request, *, most: int, usual: int, others: Mapping[str, tuple[str, ...]] | None = None) -> Json:
    """`after`, `limit` and others of a list; those that are not given are None, `limit` then is the usual one.

    Args:
        most: that a page may hold.
        others: further parameters with the values they may have; no value for any.

    Raises:
        ApiError: 400 for a parameter that is wrong or unknown.
    """
    known = {"after": (), "limit": (), **(others or {})}
    query: Json = dict.fromkeys(known)
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise invalid(name[:64], "is not known", "unknown_parameter")
        if query[name] is not None:
            raise invalid(name, "is given twice")
        if known[name] and value not in known[name]:
            raise invalid(name, f"needs to be one of {', '.join(known[name])}")
        query[name] = value
    limit = query["limit"]
    if limit is not None and not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= most):
        raise invalid("limit", f"needs to be a whole number from 1 to {most}")
    query["limit"] = usual if limit is None else int(limit)
    return query


def page(objects: list[Json], more: bool) -> Json:
    """A page of a list."""
    first, last = (objects[0]["id"], objects[-1]["id"]) if objects else (None, None)
    return {"object": "list", "data": objects, "first_id": first, "last_id": last, "has_more": more}
