"""What an input is, by its first lines and the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..protocol import ApiError, read_call
from ..protocol.body import parse
from . import tables
from .form import CHAT, Form, defaults_of
from .settings import BatchSettings
from .source import Source
from .template import Template

PROMPT_COLUMNS = ("prompt", "question", "text", "messages")
FOR_ROWS = ("prompt_column", "template", "system", "think", "raw", "column_prefix")


def detect(settings: BatchSettings, source: Source) -> Form:
    """The form of an input.

    Raises:
        ConfigError: the settings say nothing about such an input, or name columns that it does not have.
    """
    given = [name for name in FOR_ROWS if getattr(settings, name)]
    into_table = tables.is_table(settings.target)
    wanted = settings.format
    if wanted == "auto" and (source.table or given or into_table):
        wanted = "rows"
    if wanted == "openai":
        if source.table or into_table:
            name = source.name if source.table else settings.target
            raise ConfigError(f"{name}: OpenAI's format is JSON lines, not Parquet")
        if given:
            raise ConfigError(f"{given[0]}: is for rows with a prompt; requests in OpenAI's format say it themselves")
    names = source.columns()
    template = None if settings.template is None else Template(settings.template)
    column = settings.prompt_column
    needed = template.columns if template else (column,) if column else ()
    if names is None and not (source.once and (wanted == "openai" or needed)):
        names = []
        for row in _rows(source):
            if wanted == "auto":
                wanted = _kind(row)
            names += [name for name in row if name not in names]
            if source.once and wanted != "auto":
                break  # whoever writes to a pipe may wait for the answer to the first line
    wanted = "openai" if wanted == "auto" else wanted
    if wanted == "rows":
        for name in needed:
            if names and name not in names:
                flag = "template" if template else "prompt_column"
                raise ConfigError(f"{flag}: {source.name} has no column {name!r} (it has: {', '.join(names)})")
        if not needed:
            column = next((name for name in PROMPT_COLUMNS if name in (names or PROMPT_COLUMNS)), None)
            if column is None:
                known = f"{', '.join(PROMPT_COLUMNS[:-1])} or {PROMPT_COLUMNS[-1]}"
                raise ConfigError(
                    f"prompt_column: {source.name} has no column {known} (it has: {', '.join(names or [])}); name one"
                )
    form = Form(
        format=wanted,
        model=settings.model,
        any_model=settings.any_model,
        url=settings.url,
        prompt_column=column if wanted == "rows" and not template else None,
        template=template,
        system=settings.system,
        think=settings.think,
        raw=settings.raw,
        column_prefix=settings.column_prefix,
        keep=not (source.table and into_table),
        defaults=defaults_of(settings.params),
        seed=settings.seed,
    )
    if wanted == "rows" and (taken := next((name for name in form.answer_columns if name in (names or [])), None)):
        raise ConfigError(
            f"column_prefix: {source.name} has a column {taken!r}, as answers do; set a prefix for theirs"
        )
    _check(form)
    return form


def _kind(row: Mapping[str, Any]) -> str:
    if "body" in row or ("custom_id" in row and ("url" in row or "method" in row)):
        return "openai"
    return "rows" if any(name in row for name in PROMPT_COLUMNS) else "auto"


def _rows(source: Source) -> Any:
    for record in source.peek():
        if isinstance(record.data, dict):
            yield record.data
        elif record.data is not None:
            try:
                row = parse(record.data)
            except ApiError:
                continue
            if isinstance(row, dict):
                yield row


def _check(form: Form) -> None:
    """Refuses settings that no request could have."""
    body = {"model": form.model, "messages": [{"role": "user", "content": "."}], "diffusion": dict(form.defaults)}
    try:
        read_call(CHAT, body)
    except ApiError as error:
        raise ConfigError(error.message.removeprefix("diffusion.")) from None
