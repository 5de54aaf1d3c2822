"""The animated SVG: well-formed, self-contained, small, honest about the run, and whole or not there at all."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from fake_model import STORY, FakeModel, Invoke

from dgemma.cli import files

SVG = "{http://www.w3.org/2000/svg}"


def record(path: Path, invoke: Invoke, prompt: str = "Tell me a story", *flags: str) -> ET.Element:
    result = invoke("generate", prompt, "--record", str(path), *flags)
    assert (result.exit_code, result.stderr) == (0, "")
    return ET.parse(path).getroot()


def frames(root: ET.Element) -> list[ET.Element]:
    return root.findall(f"{SVG}g")


def words(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_a_frame_a_step_and_the_answer_last(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    root = record(tmp_path / "a.svg", invoke)
    pictures = frames(root)
    assert len(pictures) == 27 + 1
    assert root.get("width") == "860"
    assert "Tell me a story" in words(root)
    for number, picture in enumerate(pictures[:9], start=1):
        assert f"canvas 1 · step {number}/48" in words(picture)
    assert "canvas 2 · step 1/48" in words(pictures[9])
    assert "".join(words(pictures[-1]).split()).startswith("".join(STORY.split()))
    assert "seed 11" in words(pictures[-1])


def test_only_the_last_frame_is_seen_where_nothing_moves(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    pictures = frames(record(tmp_path / "a.svg", invoke))
    assert [picture.get("visibility") for picture in pictures] == ["hidden"] * 27 + [None]


def test_frames_follow_each_other_without_a_gap_and_the_last_stays_longest(
    tmp_path: Path, invoke: Invoke, model: FakeModel
) -> None:
    style = record(tmp_path / "a.svg", invoke).find(f"{SVG}style").text
    spans = []
    for body in re.findall(r"@keyframes k\d+\{((?:[\d.]+%\{visibility:\w+\})+)\}", style):
        moments = [(float(at), state) for at, state in re.findall(r"([\d.]+)%\{visibility:(\w+)\}", body)]
        start = next(at for at, state in moments if state == "visible")
        end = next((at for at, state in moments if state == "hidden" and at > start), 100.0)
        spans.append((start, end))
    assert len(spans) == 28
    assert spans[0][0] == 0 and spans[-1][1] == 100
    assert all(first[1] == then[0] for first, then in pairwise(spans))
    lengths = [end - start for start, end in spans]
    assert max(lengths) == lengths[-1]
    assert "infinite" in style and "prefers-reduced-motion" in style


def test_the_three_looks_appear(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    root = record(tmp_path / "a.svg", invoke)
    classes = {element.get("class") for element in root.iter()}
    assert {"settled", "revised", "high", "middle"} <= classes


def test_self_contained_and_without_script(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    record(tmp_path / "a.svg", invoke)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert not re.search(r"<script|<image|<foreignObject|href|url\(|@import|\son\w+=", text)


def test_markup_in_prompt_and_answer_is_escaped(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    model.text = "<script>alert(1)</script> & ]]> \x1b[31m \ufffe done"
    root = record(tmp_path / "a.svg", invoke, 'a <b> & "c" </title>')
    assert 'a <b> & "c" </title>' in words(root)
    assert "<script>alert(1)</script>" in words(frames(root)[-1])
    assert not root.findall(f".//{SVG}script")


@pytest.mark.parametrize(("canvas", "steps"), [(256, 12), (256, 48), (32, 48)])
def test_size(canvas: int, steps: int, tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    model.text, model.canvas, model.steps = STORY * 6, canvas, steps
    root = record(tmp_path / "a.svg", invoke)
    assert (tmp_path / "a.svg").stat().st_size < 320_000
    pictures = frames(root)
    assert len(pictures) > 12
    assert "tokens/forward" in words(pictures[-1])
    assert "step 1/48" in words(pictures[0])


def test_everything_stays_inside_the_card(tmp_path: Path, invoke: Invoke, model: FakeModel) -> None:
    model.text, model.canvas = STORY * 4, 256
    root = record(tmp_path / "a.svg", invoke, "a very long question " * 12)
    height = int(root.get("height"))
    for element in root.iter():
        if element.get("x"):
            assert 0 <= float(element.get("x")) < 860
        if element.get("y"):
            assert 0 <= float(element.get("y")) < height
    for row in root.iter(f"{SVG}text"):
        spans = [(float(span.get("x")), span.text) for span in row.findall(f"{SVG}tspan") if span.get("x")]
        for x, text in spans:
            assert x + len(text) * 10.8 <= 860


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.svg"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_exit_code_1(
    tmp_path: Path, invoke: Invoke, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "a.svg")

    monkeypatch.setattr(os, "replace", fail)
    result = invoke("generate", "hi", "--record", str(tmp_path / "a.svg"))
    assert result.exit_code == 1
    assert result.stdout == STORY + "\n"
    assert result.stderr == "error: a.svg: No space left on device\n"
