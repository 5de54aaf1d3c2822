"""Packed copies that are not valid: never a crash or other weights, but the model's own files and a word why."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_copies import is_mapped, left_in, same, words

from dgemma.checkpoint import kept
from dgemma.checkpoint.hub import copy_path
from dgemma.checkpoint.keeper import Keeper
from dgemma.checkpoint.kept import PackedCopyUnused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), length


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another header of the same length."""
    header, length = header_of(path)
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text.ljust(length))


def about(**values: str) -> Callable[[Path], None]:
    return lambda path: edited(path, lambda header: header["__metadata__"].update(values))


def few(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(header: dict[str, Any]) -> None:
        held = json.loads(header["__metadata__"]["few"])
        change(held)
        header["__metadata__"]["few"] = json.dumps(held)

    return lambda path: edited(path, apply)


NAME = "layers.0.experts.down_proj"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "short by a byte": (lambda p: os.truncate(p, p.stat().st_size - 1), "is damaged"),
    "short by half": (lambda p: os.truncate(p, p.stat().st_size // 2), "is damaged"),
    "empty": (lambda p: os.truncate(p, 0), "is damaged"),
    "too long": (lambda p: os.truncate(p, p.stat().st_size + 1), "is damaged"),
    "no header": (lambda p: p.write_bytes(b"\0" * p.stat().st_size), "is damaged"),
    "no metadata": (lambda p: edited(p, lambda header: header.pop("__metadata__")), "is damaged"),
    "metadata that are none": (lambda p: edited(p, lambda header: header.update(__metadata__=[])), "is damaged"),
    "another format": (about(format="pt"), "is damaged"),
    "another version": (about(layout="0"), "is of another version of dgemma"),
    "another source": (about(source="0" * 32), "is of what the model's files were before"),
    "another dtype": (about(dtype="bfloat16"), "has numbers in bfloat16, not in float32"),
    "no dtype": (about(dtype="wide"), "is damaged"),
    "a count that is none": (about(vision="many"), "is damaged"),
    "no bits": (about(few="{"), "is damaged"),
    "bits that are a list": (about(few="[]"), "is damaged"),
    "other bits": (few(lambda held: held.update({NAME: [8, 32]})), "is damaged"),
    "odd bits": (few(lambda held: held.update({NAME: [5, 32]})), "is damaged"),
    "bits that are no number": (few(lambda held: held.update({NAME: ["4", 32]})), "is damaged"),
    "a group of none": (few(lambda held: held.update({NAME: [4, 0]})), "is damaged"),
    "a group of few": (few(lambda held: held.update({NAME: [4, 16]})), "is damaged"),
    "one weight less": (few(lambda held: held.pop(NAME)), "is damaged"),
    "bits of no weight": (few(lambda held: held.update(x=[4, 32])), "is damaged"),
    "one name more": (
        lambda p: edited(p, lambda h: h.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})),
        "is damaged",
    ),
    "another shape": (lambda p: edited(p, lambda header: header[f"{NAME}.data"]["shape"].reverse()), "is damaged"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_not_valid(damage: str, model: Path, load: Any, cache: Path) -> None:
    """A line that names it and why, and the weights from the model's own files. Where it is to be kept it is replaced,
    and nothing is said."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    change, why = DAMAGES[damage]
    change(path)
    with words() as said:
        found = load(model)
    (text,) = said
    assert text.startswith(f"{path}: {why}") and "--keep-packed" in text and "\n" not in text
    assert same(found, wanted) and not is_mapped(found, path)
    if path.is_dir():
        return
    assert same(load(model, keep_packed=True), wanted)
    assert is_mapped(load(model), path) and left_in(cache) == [path.name]


def test_no_byte_of_the_header_can_crash_it(model: Path, load: Any) -> None:
    """With any one of them turned over, the weights are those of the model or there is a word why not."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    whole = path.read_bytes()
    _, length = header_of(path)
    text = whole[8 : 8 + length].rstrip()
    for place in [*range(8), *range(8, 8 + len(text), 331)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with words() as said:
            found = load(model)
        assert same(found, wanted) and (said or is_mapped(found, path)), place


CHANGES: dict[str, Callable[[Path], None]] = {
    "touched": lambda weights: os.utime(weights, (1, 1)),
    "longer": lambda weights: weights.write_bytes(weights.read_bytes() + b" "),
    "fetched again": lambda weights: weights.write_bytes(weights.read_bytes()),
    "other content, same size and time": lambda weights: _overwrite(weights),
}


def _overwrite(path: Path) -> None:
    """As where a tool gives all files the same time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_has_changed(change: str, model: Path, load: Any) -> None:
    load(model, keep_packed=True)
    CHANGES[change](model / "model.safetensors")
    if change == "longer":
        os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    with pytest.warns(PackedCopyUnused, match="is of what the model's files were before"):
        fresh = load(model)
    assert same(load(model, keep_packed=True), fresh) and same(load(model), fresh)


def test_settings_that_have_changed(model: Path, load: Any) -> None:
    """`config.json` says how weights are read; what a tokenizer or defaults of requests say changes no weight."""
    wanted, path = load(model, keep_packed=True), copy_path(model)
    (model / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert is_mapped(load(model), path)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.warns(PackedCopyUnused, match="were before"):
        assert same(load(model), wanted)


def test_a_source_that_changes_while_it_is_read(
    model: Path, load: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "begin", lambda *_: os.utime(model / "model.safetensors", (1, 1)))
    with pytest.warns(PackedCopyUnused, match="no packed copy is kept .the model's files changed"):
        load(model, keep_packed=True)
    assert left_in(cache) == []


def test_one_type_at_a_time(model: Path, load: Any) -> None:
    """The other one is read from the files, with a word."""
    load(model, keep_packed=True)
    with pytest.warns(PackedCopyUnused, match="float32, not in bfloat16"):
        half = load(model, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and not is_mapped(half, copy_path(model))
    load(model, dtype=torch.bfloat16, keep_packed=True)
    assert same(load(model, dtype=torch.bfloat16), half)


def test_pages_that_the_disk_does_not_give(model: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the model's own files, instead of a crash in the first step. Where the system has no such call, each
    page comes when it is touched."""
    wanted = load(model, keep_packed=True)

    class Failing:
        """A mapping whose pages cannot be had."""

        def __init__(self, code: int):
            self.code = code

        def __len__(self) -> int:
            return 1

        def madvise(self, *_: int) -> None:
            raise OSError(self.code, os.strerror(self.code))

    populate, code = kept._populate, 14
    monkeypatch.setattr(kept, "_populate", lambda path, _: populate(path, Failing(code)))  # type: ignore[arg-type]
    with pytest.warns(PackedCopyUnused, match="cannot be read .Bad address"):
        assert same(load(model), wanted)
    code = 22
    assert is_mapped(load(model), copy_path(model))
