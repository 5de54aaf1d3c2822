"""Damaged model directories, through the command line: exit code 2 and one line that names what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dgemma.checkpoint import resolve
from dgemma.cli.app import app

WEIGHTS = "model.safetensors"


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes a JSON file of the directory."""

    def apply(directory: Path) -> None:
        data = json.loads((directory / name).read_text(encoding="utf-8"))
        change(data)
        (directory / name).write_text(json.dumps(data), encoding="utf-8")

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the weights."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Replaces a file."""
    return lambda directory: (directory / name).write_bytes(content)  # type: ignore[return-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def truncate(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def pickle_instead(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")


def lost_shard(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": {"model.decoder.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


TEXT, NORM = "text_config", "model.decoder.norm.weight"
Q = "model.decoder.layers.0.self_attn.q_proj.weight"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "config.json"),
    "config is no JSON": (write("config.json", b"{"), "config.json"),
    "config is a list": (write("config.json", b"[]"), "config.json"),
    "another model": (edit_json("config.json", lambda c: c.update(model_type="llama")), "model_type"),
    "unknown key": (edit_json("config.json", lambda c: c[TEXT].update(hiden_size=3)), "hiden_size"),
    "unknown key at the top": (edit_json("config.json", lambda c: c.update(canvas_lenght=3)), "canvas_lenght"),
    "missing size": (edit_json("config.json", lambda c: c[TEXT].pop("hidden_size")), "hidden_size"),
    "size of no number": (edit_json("config.json", lambda c: c[TEXT].update(num_experts="8")), "num_experts"),
    "more experts used than there are": (edit_json("config.json", lambda c: c[TEXT].update(top_k_experts=99)), "top_k"),
    "no weights": (remove(WEIGHTS), "safetensors"),
    "truncated weights": (truncate, WEIGHTS),
    "empty weights": (write(WEIGHTS, b""), WEIGHTS),
    "weights of noise": (write(WEIGHTS, bytes(range(256)) * 9), WEIGHTS),
    "a pickle": (pickle_instead, "pytorch_model.bin"),
    "a lost shard": (lost_shard, "model-00001-of-00002.safetensors"),
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), NORM),
    "unexpected tensor": (edit_tensors(lambda t: t.update(extra=torch.zeros(1))), "extra"),
    "mis-shaped tensor": (edit_tensors(lambda t: t.update({Q: torch.zeros(3, 5)})), Q),
    "whole numbers": (edit_tensors(lambda t: t.update({NORM: torch.zeros(128, dtype=torch.int32)})), NORM),
    "not a number": (edit_tensors(lambda t: t.update({NORM: torch.full((128,), float("nan"))})), NORM),
    "a copy that differs": (edit_tensors(lambda t: t.update({"lm_head.weight": torch.zeros(4096, 128)})), "lm_head"),
    "broken tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json"),
    "broken template": (write("chat_template.jinja", b"{% if %}"), "chat_template.jinja"),
    "bad defaults": (edit_json("generation_config.json", lambda g: g.update(t_min=-1)), "t_min"),
    "defaults of no JSON": (write("generation_config.json", b"?"), "generation_config.json"),
    "unknown sampler": (
        edit_json("generation_config.json", lambda g: g.update(sampler_config={"_cls_name": "Dice"})),
        "sampler_config",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_one_line_that_names_it(case: str, tmp_path: Path) -> None:
    damage, named = CASES[case]
    directory = tmp_path / "model"
    shutil.copytree(resolve("demo"), directory)
    damage(directory)
    result = CliRunner().invoke(app, ["generate", "hi", "--model", str(directory)])
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert named in result.stderr


def test_a_prompt_longer_than_the_context() -> None:
    result = CliRunner().invoke(app, ["generate", "hello " * 9000])
    assert result.exit_code == 2 and "context" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
