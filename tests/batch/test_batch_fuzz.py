"""Malformed and valid lines mixed: every line is accounted for, and the valid ones are answered."""

from __future__ import annotations

from pathlib import Path

from fakes import FakeModel
from fuzz import assert_accounted_for, mixed

from dgemma.batch import BatchSettings, run

LINES = 4000  # benchmarks/batch_fuzz.py does it with 100,000


def test_every_line_is_accounted_for(tmp_path: Path) -> None:
    good, bad = mixed(tmp_path / "in.jsonl", LINES)
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl", sync_seconds=0.1)
    summary = run(settings, FakeModel())
    assert (summary.done, summary.failed) == (len(good), len(bad))
    assert_accounted_for(tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl", good, bad)
