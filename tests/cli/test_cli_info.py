"""`dgemma info` on the released model's sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_model import Invoke

RELEASED = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 256,
    "dtype": "bfloat16",
    "text_config": {
        "vocab_size": 262144,
        "hidden_size": 2816,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "intermediate_size": 2112,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
    },
}


@pytest.fixture
def released(tmp_path: Path) -> str:
    """A directory with the released model's config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    return str(tmp_path)


def test_the_released_model(released: str, invoke: Invoke) -> None:
    result = invoke("info", released)
    assert (result.exit_code, result.stderr) == (0, "")
    for fact in ("25.2 B", "3.8 B", "262,144 tokens", "256 tokens", "no weights here", "bfloat16", "int4"):
        assert fact in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80 + len(released)


def test_json(released: str, invoke: Invoke) -> None:
    data = json.loads(invoke("info", released, "--json").stdout)
    assert data["parameters"] == sum(data["parameters_by_part"].values())
    assert round(data["active_parameters"] / 1e9, 1) == 3.8
    memory = data["memory"]
    assert memory["float32"]["weights_bytes"] > memory["bfloat16"]["weights_bytes"] > memory["int4"]["weights_bytes"]
    for form in memory.values():
        assert form["total_bytes"] == form["weights_bytes"] + form["cache_bytes"]


def test_gpus_are_told(released: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.cli.info._gpus", lambda: [("Big GPU", 80 * 2**30)])
    text = invoke("info", released).stdout
    assert "Big GPU with 80.0 GiB" in text
    rows = {line.split()[0]: line for line in text.splitlines() if " GiB" in line and "fits" not in line}
    assert "not one GPU" in rows["float32"]
    assert "not one GPU" not in rows["bfloat16"] and "one GPU" in rows["bfloat16"]


@pytest.mark.parametrize(("gigabytes", "fitting"), [(12, set()), (18, {"int4"}), (32, {"int4", "int8", "fp8"})])
def test_what_fits_follows_from_the_machine(
    gigabytes: int, fitting: set[str], released: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released sizes: 18 GB hold the model in 4 bits and in no other format."""
    monkeypatch.setattr("dgemma.checkpoint.summary.machine_memory", lambda: gigabytes * 10**9)
    monkeypatch.setattr("dgemma.cli.info._gpus", list)
    memory = json.loads(invoke("info", released, "--json").stdout)["memory"]
    assert {name for name, form in memory.items() if form["fits_in_machine_memory"]} == fitting
