"""Parquet: rows in, and answers beside their rows out, in the input's order."""

from __future__ import annotations

import base64
import json
import math
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .files import replacing

ROWS = 1024  # read at once
GROUP = 16384  # rows of a row group that is written


def is_table(path: Path | str) -> bool:
    """By the file's name."""
    return Path(path).suffix.lower() == ".parquet"


def need(name: str) -> None:
    """Raises ConfigError where pyarrow is missing; `name` is the file."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(f"{name}: Parquet needs the package pyarrow (pip install 'dgemma[batch]')") from None


def columns(path: Path) -> list[str]:
    """Names of the columns."""
    return list(_open(path).schema_arrow.names)


def rows(path: Path, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows as plain values; memory for one row group's compressed columns at most.

    Raises:
        ConfigError: the file is damaged.
    """
    for batch in _batches(path, names, ROWS):
        yield from batch.to_pylist()


def plain(value: Any) -> Any:
    """A value as JSON has it: times in ISO's form, bytes in base64, what is no number null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def write_beside(source: Path, answers: Path, target: Path, line: str, kinds: dict[str, str]) -> None:
    """Writes the rows of a table that have an answer, with the answer's columns.

    Args:
        answers: JSON lines, in any order; their column `line` is the row's number.
        kinds: columns to add -> Arrow types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = _places(answers, line)
    own = _open(source).schema_arrow.remove_metadata()
    added = [pa.field(name, kind) for name, kind in kinds.items()]
    number = 0
    with (
        replacing(target) as temporary,
        pq.ParquetWriter(temporary, pa.schema([*own, *added]), compression="zstd") as writer,
        answers.open("rb") as file,
    ):
        for batch in _batches(source, None, GROUP):
            lines = range(number + 1, number + 1 + batch.num_rows)
            number += batch.num_rows
            there = [place for place, line_number in enumerate(lines) if _place(places, line_number) >= 0]
            given = [_read(file, places[number - batch.num_rows + 1 + place]) for place in there]
            arrays = [pa.array([one.get(f.name) for one in given], f.type) for f in added]
            table = pa.Table.from_batches([batch]).take(pa.array(there, pa.int64())).replace_schema_metadata()
            for f, values in zip(added, arrays, strict=True):
                table = table.append_column(f, values)
            writer.write_table(table)


def write_rows(answers: Path, target: Path, line: str, kinds: dict[str, str]) -> None:
    """Writes JSON lines as a table, by their column `line`. Columns whose values agree on no type become JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = _places(answers, line)
    fixed = {name: pa.type_for_alias(kind) for name, kind in kinds.items()}
    with answers.open("rb") as file:
        types: dict[str, Any] = {}
        for chunk in _chunks(file, places):
            for name in dict.fromkeys(key for row in chunk for key in row):
                kind = fixed[name] if name in fixed else _infer([row.get(name) for row in chunk])
                types[name] = _common(types[name], kind) if name in types else kind
        for name, kind in fixed.items():
            types.setdefault(name, kind)
        schema = pa.schema([(name, pa.string() if kind is None else kind) for name, kind in types.items()])
        with (
            replacing(target) as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            for chunk in _chunks(file, places):
                arrays = [_array([row.get(name) for row in chunk], kind) for name, kind in types.items()]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def merge(parts: Iterable[Path], target: Path, keep: Callable[[dict[str, Any]], bool], names: list[str]) -> None:
    """Writes the rows of several tables as one.

    Args:
        keep: is given `names`' values of a row.

    Raises:
        ConfigError: their columns differ.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = list(parts)
    schema = _open(parts[0]).schema_arrow
    with replacing(target) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts:
            if not _open(part).schema_arrow.equals(schema):
                raise ConfigError(f"{part}: has other columns than {parts[0]}")
            for batch in _batches(part, None, GROUP):
                own = batch.select([name for name in names if name in schema.names]).to_pylist()
                mask = pa.array([keep(row) for row in own], pa.bool_())
                writer.write_table(pa.Table.from_batches([batch]).filter(mask))


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{path}: cannot be read as Parquet ({reason})") from None


def _batches(path: Path, names: list[str] | None, size: int) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from _open(path).iter_batches(batch_size=size, columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"{path}: cannot be read as Parquet ({reason})") from None


def _places(path: Path, line: str) -> array[int]:
    """Where each line's answer begins in the file, -1 for none; 8 MB a million lines."""
    places, start = array("q"), 0
    with path.open("rb") as file:
        for data in file:
            number = json.loads(data)[line]
            if number >= len(places):
                places.extend([-1] * (max(number + 1, 2 * len(places), 1024) - len(places)))
            places[number] = start
            start += len(data)
    return places


def _place(places: array[int], line: int) -> int:
    return places[line] if line < len(places) else -1


def _read(file: Any, place: int) -> dict[str, Any]:
    file.seek(place)
    return json.loads(file.readline())


def _chunks(file: Any, places: array[int]) -> Iterator[list[dict[str, Any]]]:
    chunk = []
    for place in places:
        if place >= 0:
            chunk.append(_read(file, place))
            if len(chunk) == GROUP:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _infer(values: list[Any]) -> Any:
    """Their Arrow type; None if they have none in common."""
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return None
    return None if _is_hollow(kind) else kind


def _is_hollow(kind: Any) -> bool:
    """Whether there is an object without fields in it, which Parquet has no form for."""
    import pyarrow as pa

    below = [kind.field(place).type for place in range(kind.num_fields)]
    return (pa.types.is_struct(kind) and not below) or any(map(_is_hollow, below))


def _common(one: Any, other: Any) -> Any:
    import pyarrow as pa

    if one is None or other is None:
        return None
    both = [pa.schema([("", one)]), pa.schema([("", other)])]
    try:
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _array(values: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    if kind is not None and not pa.types.is_null(kind):
        return pa.array(values, kind)
    if kind is not None:
        return pa.nulls(len(values), pa.null())
    return pa.array([None if one is None else json.dumps(one, ensure_ascii=False) for one in values], pa.string())
