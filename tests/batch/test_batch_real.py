"""Batches on the demo model: resumed texts, other batches, shared beginnings, `generate`'s own answers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from lines import read, seed_of, text_of, write

import dgemma
from dgemma import EngineSettings, SamplingParams
from dgemma.batch import BatchSettings, Progress, Summary, run
from dgemma.batch.weights import weights
from dgemma.tasks import held_out

FAMILIES = ("sorting", "records", "calendar")
PARAMS = {"max_new_tokens": 48, "canvas_length": 64, "stop_at_end": True, "max_denoising_steps": 6}


def requests(count: int) -> list[dict[str, Any]]:
    """Held-out prompts of three families in turn."""
    examples = [e for group in zip(*(held_out(f, count, 5) for f in FAMILIES), strict=True) for e in group]
    return [
        {
            "custom_id": f"q{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "demo", "messages": [{"role": "user", "content": e.prompt}]},
        }
        for n, e in enumerate(examples[:count])
    ]


@pytest.fixture(scope="module")
def model() -> dgemma.Model:
    return dgemma.load("demo", engine=EngineSettings(max_batch=4))


def texts(path: Path) -> dict[str, str]:
    return {line["custom_id"]: text_of(line) for line in read(path)}


def start(source: Path, target: Path, model: Any, stop_after: int = 0, **more: Any) -> Summary:
    stop = threading.Event()

    def report(progress: Progress) -> None:
        if stop_after and progress.done >= stop_after:
            stop.set()

    params = SamplingParams(**PARAMS)
    return run(BatchSettings(source=source, target=target, params=params, **more), model, report, stop=stop)


def test_resumed_texts_are_those_of_generate(tmp_path: Path, model: dgemma.Model) -> None:
    """Stopped in the middle, resumed in another batch size: each text is what `generate` gives with its seed."""
    asked = requests(9)
    source = write(tmp_path / "in.jsonl", asked)
    assert start(source, tmp_path / "out.jsonl", model, 2, ahead=2).stopped
    before = texts(tmp_path / "out.jsonl")
    assert 2 <= len(before) < 9
    other = dgemma.load("demo", engine=EngineSettings(max_batch=2))
    assert start(source, tmp_path / "out.jsonl", other).resumed == len(before)
    alone = {
        line["custom_id"]: model.generate(
            line["body"]["messages"], SamplingParams(**PARAMS, seed=seed_of(f"id {line['custom_id']}"))
        ).text
        for line in asked
    }
    assert texts(tmp_path / "out.jsonl") == alone
    assert len(set(alone.values())) == 9


def test_a_line_too_long_for_the_model_is_an_error_line(tmp_path: Path, model: dgemma.Model) -> None:
    long, short = requests(2)
    long["body"]["messages"][0]["content"] *= 3000
    source = write(tmp_path / "in.jsonl", [long, short])
    assert start(source, tmp_path / "out.jsonl", model).done == 1
    (failure,) = read(tmp_path / "out.errors.jsonl")
    assert failure["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_a_shared_beginning_is_encoded_once(tmp_path: Path) -> None:
    few_shots = "\n".join(f"{e.prompt} {e.answer}" for e in held_out("calendar", 40, 9)) + "\n"
    model = dgemma.load("demo", engine=EngineSettings(max_batch=4))
    header = len(model.tokens_of(few_shots, raw=True)) // model.engine.settings.page_size
    assert header >= 2
    rows = [{"prompt": few_shots + e.prompt} for e in held_out("calendar", 12, 11)]
    source = write(tmp_path / "in.jsonl", rows)
    assert start(source, tmp_path / "out.jsonl", model, raw=True).done == 12
    # All but the first batch, which has nobody before it.
    assert model.status().reused_tokens >= (12 - 4) * header * model.engine.settings.page_size
    model.close()


def test_a_map_of_the_demo_by_its_name() -> None:
    prompts = [e.prompt for e in held_out("records", 3, 5)]
    params = SamplingParams(**PARAMS, seed=1)
    results = list(dgemma.map(({"prompt": prompt, "id": 1} for prompt in prompts), "demo", params))
    model = dgemma.load("demo")
    assert [result.text for result in results] == [model.generate(prompt, params).text for prompt in prompts]


def test_weights_are_told_apart(tmp_path: Path, model: dgemma.Model, tiny_checkpoint: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert weights(copy) == weights(tiny_checkpoint) != weights(model.directory)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert weights(copy) != weights(tiny_checkpoint)
