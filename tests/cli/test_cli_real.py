"""The commands on a real network: random weights, the demo's tokenizer and template, nothing replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fake_model import Invoke

SOURCE = Path(__file__).parents[2] / "src"
QUICK = ("--seed", "1", "--max-new-tokens", "24", "--max-steps", "3", "--device", "cpu")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint with random weights."""
    import torch

    from dgemma.checkpoint import save_checkpoint
    from dgemma.config import ModelConfig
    from dgemma.model import Network
    from dgemma.params import GenerationConfig
    from dgemma.text import Tokenizer

    text_files = SOURCE / "dgemma" / "demo"
    tokenizer = Tokenizer.read(text_files)
    assert tokenizer is not None
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16}
    experts = {"num_experts": 2, "top_k_experts": 1, "max_position_embeddings": 512}
    text = {"vocab_size": tokenizer.size, "sliding_window": 32, **sizes, **heads, **experts}
    config = ModelConfig.from_dict({"model_type": "diffusion_gemma", "canvas_length": 16, "text_config": text})
    network = Network(config)
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.detach().normal_(0.5, 0.5, generator=generator)
    path = tmp_path_factory.mktemp("real")
    generation = GenerationConfig(eos_token_ids=(1, 106))
    save_checkpoint(network, config, path, generation=generation, text_files=text_files, dtype=torch.float32)
    return str(path)


def test_json_is_what_python_says(directory: str, invoke: Invoke) -> None:
    import dgemma

    result = invoke("generate", "Hello", "--model", directory, "--json", *QUICK)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    params = dgemma.SamplingParams(seed=1, max_new_tokens=24, max_denoising_steps=3)
    same = dgemma.load(directory, device="cpu").generate("Hello", params)
    assert (data["text"], data["tokens"], data["seed"]) == (same.text, same.tokens, 1)
    assert data["stats"]["steps_per_canvas"] == same.stats.steps_per_canvas
    assert data["stats"]["new_tokens"] == len(data["tokens"]) <= 24


@pytest.mark.parametrize("more", [(), ("--raw",), ("--system", "Be brief"), ("--canvas-length", "8")])
def test_text_is_that_of_json(more: tuple[str, ...], directory: str, invoke: Invoke) -> None:
    arguments = ("generate", "Hello", "--model", directory, *QUICK, *more)
    text = json.loads(invoke(*arguments, "--json").stdout)["text"]
    assert invoke(*arguments).stdout.removesuffix("\n") == text.removesuffix("\n")


def test_autoregressive(directory: str, invoke: Invoke) -> None:
    result = invoke("generate", "Hello", "--model", directory, *QUICK, "--mode", "autoregressive", "--stats")
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stderr and "canvas" not in result.stderr


def test_watched_and_recorded(directory: str, invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    result = invoke("generate", "Hello", "--model", directory, *QUICK, "--watch", "--record", str(path))
    assert result.exit_code == 0, result.stderr
    assert "canvas 1 · step 1/3 · " in result.stderr
    assert "step 1/3" in path.read_text(encoding="utf-8")


def test_chat(directory: str, invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    result = invoke("chat", "--model", directory, *QUICK, input=f"Hello\nAnd now?\n/save {path}\n")
    assert result.exit_code == 0, result.stderr
    assert [message["role"] for message in json.loads(path.read_text())] == ["user", "assistant"] * 2


def test_info(directory: str, invoke: Invoke) -> None:
    result = invoke("info", directory)
    assert result.exit_code == 0, result.stderr
    assert "F32" in result.stdout and directory in result.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--device", "abacus"), "--device: "),
        (("--device", "cuda:99"), "--device: "),
        (("--canvas-length", "999"), "--canvas-length: "),
        (("--max-new-tokens", "100000"), "context"),
        (("--model", "{directory}/config.json"), "config.json"),
        (("--model", "nowhere"), "nowhere"),
    ],
)
def test_refusals_of_the_library(flags: tuple[str, ...], named: str, directory: str, invoke: Invoke) -> None:
    flags = tuple(flag.format(directory=directory) for flag in flags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = invoke("generate", "Hello", "--model", directory, *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr


def test_as_a_process(directory: str) -> None:
    command = [sys.executable, "-m", "dgemma", "generate", "--model", directory, *QUICK, "--json"]
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, input=b"Hello\n", capture_output=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert json.loads(done.stdout)["seed"] == 1
