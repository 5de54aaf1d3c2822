"""Where a run's files are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from . import tables
from .settings import STREAM, BatchSettings

SUFFIXES = (".gz", ".zst", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Paths:
    """The files of one run; None where there is none.

    Fields:
        target: what the user asked for; answers: where lines are added, another file where the target is a table.
        errors, state: beside it.
        locks: files that say who is writing.
    """

    target: Path | None
    answers: Path | None
    errors: Path | None
    state: Path | None
    locks: tuple[Path, ...]

    @classmethod
    def of(cls, settings: BatchSettings) -> Paths:
        """The settings' own. Links are followed, so that one file has one lock whatever it is called by."""
        errors = None if settings.errors is None else Path(os.path.realpath(settings.errors))
        if str(settings.target) == STREAM:
            return cls(target=None, answers=None, errors=errors, state=None, locks=())
        target = Path(os.path.realpath(settings.target))
        stem = beside(target)
        answers = Path(f"{stem}.part.jsonl") if tables.is_table(target) else target
        locks = (Path(f"{stem}.lock"),) if errors is None else (Path(f"{stem}.lock"), Path(f"{errors}.lock"))
        return cls(
            target=target,
            answers=answers,
            errors=errors or Path(f"{stem}.errors.jsonl"),
            state=Path(f"{stem}.state.json"),
            locks=locks,
        )

    def check(self, source: Path | None) -> None:
        """Refuses what cannot be written.

        Raises:
            ConfigError: a folder is missing or closed, a name is taken by something that is no file, or by the input.
        """
        for path in (self.target, self.errors):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise ConfigError(f"{path}: {path.parent} is not a directory; create it first")
            if path.exists() and not path.is_file():
                raise ConfigError(f"{path}: is no regular file; - is stdout")
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise ConfigError(f"{path}: cannot be written to; choose another place")
            if source is not None and path.exists() and os.path.samefile(path, source):
                raise ConfigError(f"{path}: is the input itself; name another file")
        if self.target is not None and self.target == self.errors:
            raise ConfigError(f"{self.target}: is named for answers and for errors; name two files")

    def check_new(self) -> None:
        """Refuses to write into files that are there and no run's.

        Raises:
            ConfigError: one is.
        """
        for path in (self.target, self.errors, self.answers):
            if path is not None and path.exists() and path.stat().st_size:
                raise ConfigError(
                    f"{path}: is there already and belongs to no run that could be resumed ({self.state} is missing); "
                    "name another file, or --restart to write it anew"
                )


def beside(target: Path) -> Path:
    """The target without the suffixes of its format: what the names of the files beside it begin with."""
    while target.suffix.lower() in SUFFIXES and target.stem:
        target = target.with_suffix("")
    return target
