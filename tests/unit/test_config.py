"""`ModelConfig`: both spellings, refusals by name, and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import config_dict, refused, release_dict

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.errors import ConfigError


def refuse(data: Any, *words: str) -> None:
    refused(lambda: ModelConfig.from_dict(data), *words, kind=ConfigError)


def with_text(**text: Any) -> dict[str, Any]:
    return config_dict(**text)


def without(key: str) -> dict[str, Any]:
    data = config_dict()
    del data["text_config"][key]
    return data


def test_both_spellings_of_the_release_are_the_same_network():
    ours, theirs = ModelConfig.from_dict(release_dict()), ModelConfig.from_dict(release_dict("transformers"))
    assert ours == theirs
    assert [layer.kind for layer in ours.layers] == ([SLIDING] * 5 + [FULL]) * 5
    full, sliding = ours.layers[5], ours.layers[0]
    assert (full.heads, full.kv_heads, full.head_dim, full.theta, full.rotary_fraction) == (16, 2, 512, 1e6, 0.25)
    assert (sliding.heads, sliding.kv_heads, sliding.head_dim) == (16, 8, 256)
    assert (sliding.theta, sliding.rotary_fraction) == (1e4, 1.0)
    assert theirs.final_logit_softcapping == 30.0  # left out: the default of the class


def test_read_names_the_file(tmp_path: Path):
    path = tmp_path / "config.json"
    refused(lambda: ModelConfig.read(path), str(path), "no such file", kind=ConfigError)
    for content in ("", "[]", "nonsense", '{"model_type": "gemma3"}'):
        path.write_text(content)
        refused(lambda: ModelConfig.read(path), str(path), kind=ConfigError)
    path.write_text(json.dumps(config_dict()))
    assert ModelConfig.read(path).raw == config_dict()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (config_dict() | {"model_type": "llama"}, "'llama'"),
        (config_dict() | {"speed": 3}, "speed: unknown key"),
        (config_dict() | {"text_config": None}, "text_config: missing"),
        (config_dict() | {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (config_dict() | {"canvas_length": 0}, "canvas_length"),
        (with_text(speed=3), "text_config.speed: unknown key"),
        (with_text(tie_word_embeddings=False), "tie_word_embeddings"),
        (with_text(attention_bias=True), "attention_bias"),
        (with_text(hidden_activation="relu"), "'relu'"),
        (with_text(use_bidirectional_attention="all"), "'all'"),
        (with_text(layer_types=[FULL]), "layer_types"),
        (with_text(layer_types=[FULL, "linear"]), "layer_types"),
        (with_text(top_k_experts=5), "top_k_experts: 5"),
        (with_text(hidden_size=True), "hidden_size: True"),
        (with_text(hidden_size=16.0), "hidden_size: 16.0"),
        (with_text(vocab_size=-1), "vocab_size: -1"),
        (with_text(rms_norm_eps="small"), "rms_norm_eps: 'small'"),
        (with_text(rms_norm_eps=None), "rms_norm_eps: None"),
        (with_text(final_logit_softcapping=0), "final_logit_softcapping: 0"),
        (with_text(num_key_value_heads=3), "num_key_value_heads"),
        (with_text(per_layer_config={"1": {"window": 3}}), "per_layer_config.1.window"),
        (with_text(rope_parameters={FULL: {"rope_type": "yarn", "rope_theta": 1e6}}), "rope_type"),
        (with_text(rope_parameters={FULL: {"rope_theta": 1e6, "factor": 2}}), "factor: unknown key"),
        (with_text(rope_parameters={SLIDING: {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}), "partial_rotary"),
        *[(without(key), f"text_config.{key}: missing") for key in ("hidden_size", "num_experts", "vocab_size")],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_key(data: dict[str, Any], word: str):
    refuse(data, word)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_no_object(data: Any):
    refuse(data, "JSON object")


def test_absent_and_null_cap_differ():
    assert ModelConfig.from_dict(config_dict()).final_logit_softcapping == 30.0
    assert ModelConfig.from_dict(with_text(final_logit_softcapping=None)).final_logit_softcapping is None
    assert ModelConfig.from_dict(with_text(final_logit_softcapping=15)).final_logit_softcapping == 15.0


def test_layer_types_default_to_five_and_one_and_end_with_a_full_layer():
    data = with_text(num_hidden_layers=8)
    del data["text_config"]["layer_types"]
    assert [layer.sliding for layer in ModelConfig.from_dict(data).layers] == [True] * 5 + [False, True, False]
    assert not ModelConfig.from_dict(with_text(layer_types=[FULL, SLIDING])).layers[-1].sliding


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_hidden_layers": 1, "layer_types": [FULL]},
        {"num_hidden_layers": 3, "layer_types": [SLIDING] * 3, "num_key_value_heads": 1, "head_dim": 4},
        {"per_layer_config": {"0": {"head_dim": 32}, "1": {"num_key_value_heads": 1}}},
        {"num_experts": 1, "top_k_experts": 1, "moe_intermediate_size": 3},
    ],
)
def test_counts_are_those_of_the_network(text: dict[str, Any]):
    from dgemma.checkpoint.load import empty_network

    config = ModelConfig.from_dict(with_text(**text))
    state = empty_network(config).state_dict()
    assert config.total_parameters() == sum(tensor.numel() for tensor in state.values())
    experts = sum(tensor.numel() for name, tensor in state.items() if ".experts." in name)
    routed = experts * config.top_k_experts // config.num_experts
    assert config.active_parameters() == config.total_parameters() - experts + routed


def test_cache_bytes_are_those_of_a_cache():
    from dgemma.model import Network

    config = ModelConfig.from_dict(config_dict())
    network = Network(config)
    cache = network.new_cache(batch=3)
    tokens = config.sliding_window - 1
    network.encode(torch.ones(3, tokens, dtype=torch.int64), cache)
    assert cache.bytes() == 3 * tokens * sum(config.cache_bytes_per_token(4))


def test_the_configuration_is_frozen():
    config = ModelConfig.from_dict(config_dict())
    with pytest.raises(AttributeError):
        config.hidden_size = 3  # type: ignore[misc]


def test_transformers_configuration_is_read(tmp_path: Path):
    import tiny

    for name in ("base", "cap_left_out", "low_cap", "no_grouping", "thetas", "all_rotate"):
        spec = tiny.SPECS[name]
        tiny.config(spec).save_pretrained(tmp_path)
        config = ModelConfig.read(tmp_path / "config.json")
        full, sliding = config.layers[-1], config.layers[0]
        assert (config.hidden_size, config.canvas_length, config.num_layers) == (
            spec.hidden,
            spec.canvas,
            len(spec.layers),
        )
        assert config.final_logit_softcapping == (spec.softcap or 30.0)
        assert (sliding.theta, full.theta, full.rotary_fraction) == (
            spec.theta_sliding,
            spec.theta_full,
            spec.rotary_fraction,
        )
        assert full.kv_heads == (spec.global_kv_heads or spec.kv_heads) and full.head_dim == spec.global_head_dim
