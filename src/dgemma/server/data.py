"""Uploaded files and batches, kept in a folder so that they outlive the server."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from ..batch.files import Lock, sync_folder
from ..errors import ConfigError
from ..protocol.errors import ApiError, unavailable
from ..protocol.render import new_id

Json = dict[str, Any]
Given = ParamSpec("Given")
Made = TypeVar("Made")
VERSION = 1
PART = ".part"  # of a file that is still being copied
TABLES = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, purpose TEXT NOT NULL, expires_at INTEGER,
    object TEXT NOT NULL
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, open INTEGER NOT NULL, object TEXT NOT NULL,
    seconds INTEGER, ending TEXT
);
CREATE INDEX open_batches ON batches (open, number);
"""


def default_folder() -> Path:
    """Where programs keep a user's data on this system."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "dgemma"


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    """Says what is wrong with the disk in the client's form."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        message = f"the server cannot store it ({reason})"
        raise ApiError(507, message, kind="server_error", code="insufficient_storage") from error


def _locked(
    method: Callable[Concatenate[DataFolder, Given], Made],
) -> Callable[Concatenate[DataFolder, Given], Made]:
    """One thread at a time."""

    @functools.wraps(method)
    def guarded(self: DataFolder, *args: Given.args, **named: Given.kwargs) -> Made:
        with self._lock:
            return method(self, *args, **named)

    return guarded


class DataFolder:
    """`state.sqlite` says what there is, `files/ID` are the contents, `batches/ID/` is where a batch works.

    Every method may be called from any thread, and may wait for the disk. The folder is made when the first file comes.

    Args:
        path: None for the user's own folder, which may be in use by another server: this one then has no files.

    Raises:
        ConfigError: another server uses the folder that is named, or it cannot be used.
    """

    def __init__(self, path: Path | None):
        self.path = path or default_folder()
        self._lock = threading.RLock()
        self._held: Lock | None = None
        self._db: sqlite3.Connection | None = None
        self._why_not: str | None = None
        try:
            if self.path.exists():
                self._open()
            else:
                parent = next(folder for folder in self.path.absolute().parents if folder.exists())
                if not parent.is_dir() or not os.access(parent, os.W_OK):
                    raise ConfigError(f"data_dir: {self.path} cannot be made in {parent}")
        except ConfigError as error:
            if path is not None:
                raise
            self._why_not = str(error)

    def close(self) -> None:
        """Lets others have it."""
        with self._lock:
            if self._db is not None:
                self._db.close()
            if self._held is not None:
                self._held.release()
            self._db = self._held = None
            self._why_not = "the server is shutting down"

    def add_file(self, content: BinaryIO, filename: str, purpose: str, seconds: int | None) -> Json:
        """Keeps a copy of a file, for so many seconds or until it is deleted; returns its object.

        Raises:
            ApiError: 507 where it cannot be stored.
        """
        self._ready()
        name = new_id("file-")
        part = self.content(name + PART)
        try:
            with _storing():
                with part.open("xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                with self._lock, self._transaction() as db:
                    os.replace(part, self.content(name))
                    sync_folder(part.parent)
                    return self._insert_file(db, name, filename, purpose, seconds)
        finally:
            part.unlink(missing_ok=True)

    @_locked
    def file(self, name: str, param: str | None = None) -> Json:
        """The object of a file.

        Args:
            param: the field that names it.

        Raises:
            ApiError: 404.
        """
        found = self._object("files", name)
        if found is None or (found["expires_at"] is not None and found["expires_at"] <= time.time()):
            where = f"{param}: " if param else ""
            raise ApiError(404, f"{where}no file {name[:80]!r}", param=param, code="file_not_found")
        return found

    def content(self, name: str) -> Path:
        """Where a file's content is."""
        return self.path / "files" / name

    @_locked
    def files(self, *, purpose: str | None, after: str | None, limit: int, newest: bool) -> tuple[list[Json], bool]:
        """A page of the files, and whether there are more.

        Raises:
            ApiError: 404, there is no file `after`.
        """
        where = "(expires_at IS NULL OR expires_at > ?) AND (? IS NULL OR purpose = ?)"
        return self._page("files", where, (int(time.time()), purpose, purpose), after, limit, newest)

    @_locked
    def delete_file(self, name: str) -> None:
        """Forgets a file.

        Raises:
            ApiError: 404; 400 where a batch still needs it.
        """
        self.file(name)
        for batch in self.open_batches():
            if batch["input_file_id"] == name:
                message = f"file_id: {name} is the input of {batch['id']}, which is not done; cancel that first"
                raise ApiError(400, message, param="file_id", code="file_in_use")
        with self._transaction() as db:
            db.execute("DELETE FROM files WHERE id = ?", (name,))
        self.content(name).unlink(missing_ok=True)

    @_locked
    def sweep(self) -> None:
        """Forgets the files whose time is over, those that batches need excepted, and what no row speaks of."""
        if self._db is None:
            return
        kept = tuple(batch["input_file_id"] for batch in self.open_batches())
        holes = ", ".join("?" * len(kept))
        with self._transaction() as db:
            db.execute(f"DELETE FROM files WHERE expires_at <= ? AND id NOT IN ({holes})", (int(time.time()), *kept))
        known = {name for (name,) in self._db.execute("SELECT id FROM files")}
        made = {name for batch in self.open_batches() for name in self.made_by(batch["id"])}
        for path in (self.path / "files").iterdir():
            if path.name not in known | made and path.suffix != PART:
                path.unlink(missing_ok=True)

    @_locked
    def add_batch(self, batch: Json, seconds: int | None) -> None:
        """Keeps a new batch, which is open.

        Args:
            seconds: that its files are kept, or None.
        """
        with self._transaction() as db:
            self.workplace(batch["id"]).mkdir()
            row = batch["id"], json.dumps(batch), seconds
            db.execute("INSERT INTO batches (id, open, object, seconds) VALUES (?, 1, ?, ?)", row)

    @_locked
    def batch(self, name: str) -> Json:
        """The object of a batch.

        Raises:
            ApiError: 404.
        """
        found = self._object("batches", name)
        if found is None:
            raise ApiError(404, f"batch_id: no batch {name[:80]!r}", param="batch_id", code="batch_not_found")
        return found

    @_locked
    def batches(self, *, after: str | None, limit: int) -> tuple[list[Json], bool]:
        """A page of the batches, the newest first, and whether there are more; errors as `files`."""
        return self._page("batches", "1", (), after, limit, True)

    @_locked
    def open_batches(self) -> list[Json]:
        """Those that are not over, the oldest first."""
        if self._db is None:
            return []
        rows = self._db.execute("SELECT object FROM batches WHERE open ORDER BY number")
        return [json.loads(text) for (text,) in rows]

    def workplace(self, name: str) -> Path:
        """The folder of a batch that is open."""
        return self.path / "batches" / name

    @staticmethod
    def made_by(name: str) -> tuple[str, str]:
        """Ids of a batch's output and of its errors."""
        stem = name.removeprefix("batch_")
        return f"file-{stem}0", f"file-{stem}1"

    @_locked
    def update(self, name: str, **changes: Any) -> Json:
        """Changes fields of a batch; returns it."""
        batch = self.batch(name) | changes
        with self._transaction() as db:
            db.execute("UPDATE batches SET object = ? WHERE id = ?", (json.dumps(batch), name))
        return batch

    @_locked
    def ending(self, name: str) -> str | None:
        """The status that a batch will have once its files are in place, if all of its work is done."""
        row = self._ready().execute("SELECT ending FROM batches WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]

    @_locked
    def end(self, name: str, ending: str, **changes: Any) -> Json:
        """A batch's work is over: what it has written becomes files. Done again after a crash, it comes to the same.

        Args:
            ending: the status that it has then.
            changes: of its other fields.
        """
        batch = self.update(name, **changes)
        with self._transaction() as db:
            db.execute("UPDATE batches SET ending = ? WHERE id = ?", (ending, name))
            (seconds,) = db.execute("SELECT seconds FROM batches WHERE id = ?", (name,)).fetchone()
        place = self.workplace(name)
        with self._transaction() as db:
            for kind, made in zip(("output", "error"), self.made_by(name), strict=True):
                written = place / f"{kind}.jsonl"
                if written.exists() and written.stat().st_size:
                    os.replace(written, self.content(made))
                if self.content(made).exists():
                    batch[f"{kind}_file_id"] = made
                    self._insert_file(db, made, f"{name}_{kind}.jsonl", "batch_output", seconds)
            sync_folder(self.path / "files")
            batch |= {"status": ending, f"{ending}_at": int(time.time())}
            db.execute("UPDATE batches SET open = 0, object = ? WHERE id = ?", (json.dumps(batch), name))
        shutil.rmtree(place, ignore_errors=True)
        return batch

    def _open(self) -> None:
        """Takes the folder, which is made where it is missing.

        Raises:
            ConfigError: it cannot be used.
        """
        try:
            for folder in (self.path / "files", self.path / "batches"):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                self._held = Lock(self.path / "lock", self.path)
            except ConfigError:
                raise ConfigError(f"data_dir: {self.path} is in use by another server; name another one") from None
            for left in (self.path / "files").glob("*" + PART):
                left.unlink(missing_ok=True)
            db = sqlite3.connect(self.path / "state.sqlite", check_same_thread=False, isolation_level=None)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise ConfigError(f"data_dir: {self.path} was written by another version of dgemma ({version})")
            if version == 0:
                db.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
            self._db = db
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise ConfigError(f"data_dir: {self.path} cannot be used ({reason or error})") from None
        finally:
            if self._db is None and self._held is not None:
                self._held.release()
                self._held = None

    @_locked
    def _ready(self) -> sqlite3.Connection:
        """The database, opened where it is not yet."""
        if self._db is None:
            try:
                if self._why_not is not None:
                    raise ConfigError(self._why_not)
                self._open()
            except ConfigError as error:
                raise unavailable(f"this server has no place for files: {error}", "no_data_folder") from None
        assert self._db is not None
        return self._db

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing.

        Raises:
            ApiError: 507 where it cannot be stored.
        """
        db = self._ready()
        with _storing():
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    def _object(self, table: str, name: str) -> Json | None:
        if self._db is None:
            return None
        row = self._db.execute(f"SELECT object FROM {table} WHERE id = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def _insert_file(self, db: sqlite3.Connection, name: str, filename: str, purpose: str, seconds: int | None) -> Json:
        now = int(time.time())
        made = {
            "id": name,
            "object": "file",
            "bytes": self.content(name).stat().st_size,
            "created_at": now,
            "expires_at": None if seconds is None else now + seconds,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        db.execute(
            "INSERT OR IGNORE INTO files (id, purpose, expires_at, object) VALUES (?, ?, ?, ?)",
            (name, purpose, made["expires_at"], json.dumps(made)),
        )
        return made

    def _page(
        self, table: str, where: str, values: Sequence[Any], after: str | None, limit: int, newest: bool
    ) -> tuple[list[Json], bool]:
        start = None
        if after is not None:
            row = self._db and self._db.execute(f"SELECT number FROM {table} WHERE id = ?", (after,)).fetchone()
            if not row:
                raise ApiError(404, f"after: no {after[:80]!r} to go on from", param="after", code="not_found")
            (start,) = row
        if self._db is None:
            return [], False
        side, order = ("<", "DESC") if newest else (">", "ASC")
        rows = self._db.execute(
            f"SELECT object FROM {table} WHERE {where} AND (? IS NULL OR number {side} ?) ORDER BY number {order} "
            "LIMIT ?",
            (*values, start, start, limit + 1),
        ).fetchall()
        return [json.loads(text) for (text,) in rows[:limit]], len(rows) > limit
