"""What is done: the files of a run, which say for every line of the input whether it is accounted for.

`OUT` and `OUT.errors.jsonl` are the truth. `OUT.state.json` remembers what the run was asked, so that no other one goes
on with its files; `OUT.lock` is there while a process writes them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import tables
from .answer import Outcome
from .append import Appender, Sink, mend
from .codecs import codec_of, need_codec
from .files import Lock, write_json
from .form import Form, Refusal, Request
from .paths import Paths
from .sets import Lines
from .settings import BatchSettings
from .source import Source
from .writer import Stdout, Writer

VERSION = 1
ARROW = ("int64", "string", "string", "int32", "int32", "int64", "string")  # of a form's answer columns


class Ledger:
    """The files of one run, locked, mended and open for more. Used as a context.

    Fields:
        lines: those accounted for, in both files; done, failed: how many are in each.
        form: with the run's name in it.
        state: what `OUT.state.json` says.
        mended: lines that were dropped from the files because they could not be read.

    Raises:
        ConfigError: another process writes the files, they are no run's, or another run's.
        OSError: they cannot be written.
    """

    def __init__(self, settings: BatchSettings, source: Source, form: Form):
        self.settings, self.source = settings, source
        self.paths = paths = Paths.of(settings)
        self.lines = Lines()
        self.done = self.failed = self.mended = 0
        self.finished = False
        self._locks: list[Lock] = []
        self._names: array[int] | None = array("Q") if source.once and paths.target else None
        self._writer: Writer | None = None
        self.form = form
        self.state: dict[str, Any] = {}
        paths.check(source.path)
        if paths.target is not None:
            need_codec(codec_of(paths.target), str(paths.target))
            if tables.is_table(paths.target):
                tables.need(str(paths.target))
        try:
            if paths.target is not None:
                self._begin(form)
            else:
                self.state = {"input": {} if self.source.once else self.source.stamp()}
                if paths.errors is not None:
                    paths.errors.unlink(missing_ok=True)
            if not self.finished:
                self._out: Sink = Stdout() if paths.answers is None else Appender(paths.answers)
                self._err: Sink = self._out if paths.errors is None else Appender(paths.errors, late=True)
                sinks = [self._out] if self._err is self._out else [self._out, self._err]
                self._writer = Writer(sinks, settings.sync_seconds)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
            if self.finished and self.paths.answers is not None and self.paths.answers != self.paths.target:
                self.paths.answers.unlink(missing_ok=True)
        finally:
            self._release()

    def put(self, outcome: Outcome) -> None:
        """Writes what became of a line, unless the line is accounted for already.

        Raises:
            OSError: a file cannot be written any more; what is in it is whole.
        """
        if not self.lines.add(outcome.line):
            return
        if outcome.ok:
            self.done += 1
        else:
            self.failed += 1
        assert self._writer is not None
        self._writer.put(self._out if outcome.ok else self._err, outcome.data)

    def check(self) -> None:
        """Raises what has gone wrong with the files."""
        if self._writer is not None:
            self._writer.check()

    def has(self, item: Request | Refusal) -> bool:
        """Whether a line of a stream is accounted for.

        Raises:
            ConfigError: it is not what an earlier start read there.
        """
        line, names = item.line, self._names
        if line not in self.lines:
            return False
        before = names[line] if names is not None and line < len(names) else 0  # 0: it is in the errors file
        if before and before != _mark(item.custom_id, item.row if isinstance(item, Request) else None):
            raise ConfigError(
                f"{self.source.name}: line {line} is not the one that {self.paths.target} has an answer to; give the "
                "same input again, or --restart to begin anew"
            )
        return True

    def check_stream(self) -> None:
        """Reads a stream whose answers are all there, to see that it is the same.

        Raises:
            ConfigError: it is another one.
        """
        for _ in self.source.records():
            pass
        if self.source.digest != self.state["input"].get("digest"):
            raise ConfigError(f"{self.paths.target}: was made of another content of the input; --restart begins anew")

    @property
    def checked(self) -> int | None:
        """How many lines the input has, if all of them have been checked and the bad ones written down."""
        total: int | None = self.state.get("lines")
        return total if total is not None and self.state["refused"] <= self.failed else None

    def checked_all(self, total: int) -> None:
        """Remembers that."""
        if self.paths.target is not None:
            self._flush()
            self._remember(lines=total, refused=self.failed)

    def check_model(self, digest: str) -> None:
        """Refuses to go on with another model than the answers so far are from.

        Raises:
            ConfigError: it is another one.
        """
        if self.paths.target is None:
            return
        before = self.state.get("weights")
        if before not in (None, digest):
            raise ConfigError(
                f"{self.paths.target}: was begun with other weights than {self.settings.model!r} has now; --restart "
                "begins anew"
            )
        self._remember(weights=digest)

    def changed(self) -> bool:
        """Whether the input's file is another than at the start."""
        return any(self.state["input"][name] != value for name, value in self.source.stamp().items())

    def finish(self, total: int | None) -> None:
        """All lines are accounted for: makes the table where one is wanted, and says so in the state."""
        paths, form = self.paths, self.form
        if paths.target is None or self.finished:
            return
        self._flush()
        if paths.answers is not None and paths.answers != paths.target:
            kinds = dict(zip(form.answer_columns, ARROW, strict=False))
            if form.keep:
                tables.write_rows(paths.answers, paths.target, form.answer_columns[0], kinds)
            else:
                assert self.source.path is not None
                tables.write_beside(self.source.path, paths.answers, paths.target, form.answer_columns[0], kinds)
        more = {"input": {"digest": self.source.digest}} if self.source.once else {}
        self._remember(finished=True, lines=total, done=self.done, failed=self.failed, **more)
        self.finished = True

    def _begin(self, form: Form) -> None:
        """Locks the files, finds out whose they are, and what is in them."""
        paths = self.paths
        assert paths.target is not None and paths.state is not None and paths.answers is not None
        for lock in paths.locks:
            self._locks.append(Lock(lock, paths.target))
        if self.settings.restart:
            for path in (paths.state, paths.answers, paths.target, paths.errors):
                if path is not None:
                    path.unlink(missing_ok=True)
        state = read_state(paths.state)
        if state is None:
            paths.check_new()
        identity = (state or {}).get("input", {}) if self.source.once else self._identity(state, self.source.stamp())
        asked = _asked(self.settings, form, None if self.source.once else identity["digest"])
        self.form = replace(form, run=asked["run"])
        if state is not None:
            _compare(paths.target, state.get("asked") or {}, asked)
        self.state = {"version": VERSION, **(state or {}), "asked": asked, "input": identity}
        if state is None:
            write_json(paths.state, self.state)
        if self.state.get("finished") and paths.target.exists():
            self.finished = True
            self.done, self.failed = self.state["done"], self.state["failed"]
            return
        self.mended = mend(paths.answers, self._take) + (0 if paths.errors is None else mend(paths.errors, self._miss))

    def _identity(self, state: dict[str, Any] | None, stamp: dict[str, Any]) -> dict[str, Any]:
        """The input's, with its hash; taken from the state where size, time and name are as they were."""
        before = (state or {}).get("input") or {}
        if all(before.get(name) == value for name, value in stamp.items()) and before.get("digest"):
            return before
        return self.source.identity()

    def _take(self, data: bytes) -> bool:
        """Whether a line of the output is one of ours, and the first for its line of the input."""
        answer = _parsed(data)
        if answer is None:
            return False
        line = self.form.line_of(answer)
        if line is None:
            raise ConfigError(
                f"{self.paths.target}: holds lines that are not from this run; name another file, or --restart to "
                "begin anew"
            )
        if not self.lines.add(line):
            return False
        self.done += 1
        if self._names is not None:
            self._names.extend([0] * (line + 1 - len(self._names)))
            custom_id = answer.get("custom_id")
            row = None
            if self.form.format == "rows":
                row = {name: value for name, value in answer.items() if name not in self.form.answer_columns}
            self._names[line] = _mark(None if custom_id is None else str(custom_id), row)
        return True

    def _miss(self, data: bytes) -> bool:
        """The same for the errors file."""
        answer = _parsed(data)
        line = None if answer is None else answer.get("line")
        if not isinstance(line, int) or not self.lines.add(line):
            return False
        self.failed += 1
        return True

    def _remember(self, **more: Any) -> None:
        assert self.paths.state is not None
        if any(self.state.get(name) != value for name, value in more.items()):
            self.state |= more
            write_json(self.paths.state, self.state)

    def _flush(self) -> None:
        """Everything so far is on the disk when this returns."""
        assert self._writer is not None
        self._writer.flush()

    def _release(self) -> None:
        for lock in reversed(self._locks):
            lock.release()
        self._locks = []


def _asked(settings: BatchSettings, form: Form, digest: str | None) -> dict[str, Any]:
    """Everything that the answers follow from, by the names of the settings."""
    asked = {
        "input": digest,
        "format": form.format,
        "prompt_column": form.prompt_column,
        "template": form.template and form.template.text,
        "system": form.system,
        "think": form.think,
        "raw": form.raw,
        "column_prefix": form.column_prefix,
        "model": form.model,
        "any_model": form.any_model,
        "url": form.url,
        "sampling": dict(form.defaults),
        "seed": form.seed,
        "keep": form.keep,
    }
    run = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=6).hexdigest()
    # Shards are parts of one run.
    return {**asked, "run": run, "shard": settings.shard and "{}/{}".format(*settings.shard)}


def _compare(target: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) == value or name == "run":
            continue
        if name == "input":
            raise ConfigError(f"{target}: was begun with another content of the input; --restart begins anew")
        if name == "keep":
            raise ConfigError(
                f"{target}: the run whose state is beside it wrote another kind of file; name another one, or "
                "--restart begins anew"
            )
        if name == "sampling":
            old = before.get(name) or {}
            name = next(key for key in {**value, **old} if old.get(key) != value.get(key))
            raise ConfigError(_changed(target, name, old.get(name), value.get(name)))
        raise ConfigError(_changed(target, name, before.get(name), value))


def _changed(target: Path, name: str, old: Any, new: Any) -> str:
    words = [json.dumps(value, ensure_ascii=False)[:100] for value in (old, new)]
    return f"{name}: {target} was begun with {words[0]}, not {words[1]}; --restart begins anew"


def read_state(path: Path) -> dict[str, Any] | None:
    """What `OUT.state.json` says; None where it is missing.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ConfigError(f"{path}: cannot be read as the state of a run; --restart begins anew")
    return state


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _mark(custom_id: str | None, row: Mapping[str, Any] | None) -> int:
    """Tells a line of a stream from another one: by its `custom_id`, or by all of the row."""
    return hash(custom_id or json.dumps(row, sort_keys=True)) & 0xFFFF_FFFF_FFFF_FFFF or 1
