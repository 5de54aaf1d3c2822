"""Requests that kill the process that answers them: they fail alone, all others are answered once."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
from fakes import FakeModel
from lines import assert_all_answered, dump, read, request, write

from dgemma.batch import BatchSettings, run
from dgemma.batch.deaths import Deaths
from dgemma.batch.form import Form
from dgemma.batch.source import Record
from dgemma.errors import WorkerLost

pytestmark = pytest.mark.filterwarnings("ignore:worker . of 2 ended")


def killed_while_loading() -> FakeModel:
    """One that does not come as far as to be asked."""
    os.kill(os.getpid(), signal.SIGKILL)
    return FakeModel()


def records(*lines: int) -> list[Record]:
    """What a worker had."""
    return [Record(n, dump(request(n))) for n in lines]


def test_they_fail_alone(tmp_path: Path) -> None:
    words = {5: "KILL", 6: "CRASH", 90: "NAN", 91: "KILL"}
    asked = [request(n, words.get(n)) for n in range(120)]
    write(tmp_path / "in.jsonl", asked)
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    summary = run(settings, lambda: [FakeModel, FakeModel])
    assert (summary.done, summary.failed) == (116, 4)
    assert_all_answered(tmp_path / "out.jsonl", [one for n, one in enumerate(asked) if n not in words])
    failed = read(tmp_path / "out.errors.jsonl")
    assert sorted(line["line"] - 1 for line in failed) == sorted(words)
    for line in failed:
        word, error = words[line["line"] - 1], line["response"]["body"]["error"]
        assert error["code"] == ("generation_failed" if word == "NAN" else "internal_error")
        assert ("ended by signal 9 each of the 3 times" in error["message"]) == (word == "KILL")


def test_a_process_that_cannot_load_is_not_begun_again(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(64)])
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    with pytest.raises(WorkerLost, match="worker 2 of 2 ended by signal 9 while it loaded"):
        run(settings, lambda: [FakeModel, killed_while_loading])
    assert run(settings, FakeModel()).done == 64


@pytest.mark.parametrize("killers", [{1}, {128}, {3, 4}, {1, 64, 77}, set()])
def test_any_killers_are_found_whatever_else_a_worker_has(killers: set[int]) -> None:
    deaths = Deaths(Form(format="openai", model="demo", run="f"))
    answered: list[int] = []
    died = 1  # of all, or by somebody's hand
    lots = deaths.lots(0, records(*range(1, 129)), "it died")
    while lots:
        tries, lot = lots.pop()
        if killers & {record.line for record in lot}:
            died += 1
            lots += deaths.lots(tries, lot, "it died")
        else:
            answered += [record.line for record in lot]
    assert sorted(answered) == sorted(set(range(1, 129)) - killers)
    assert sorted(outcome.line for outcome in deaths.answered()) == sorted(killers)
    assert not deaths.held and died <= 1 + 2 * len(killers)


def test_one_that_is_always_alone_gets_three_workers() -> None:
    deaths = Deaths(Form(format="openai", model="demo", run="f"))
    assert deaths.lots(0, records(7), "it died") == [(1, records(7))]
    assert deaths.lots(1, records(7), "it died") == [(2, records(7))]
    assert deaths.lots(2, records(7), "it died") == []
    (outcome,) = deaths.held
    assert b"it died each of the 3 times that it had this request" in outcome.data and not outcome.ok


def test_machines_that_die_of_everything_are_to_blame_themselves() -> None:
    deaths = Deaths(Form(format="openai", model="demo", run="f"))
    with pytest.raises(WorkerLost, match=r"^it died, with 16 requests one after another; was the memory full"):
        for line in itertools.count(1):
            deaths.lots(2, records(line), "it died")
    assert len(deaths.held) == 16
