"""`SamplingParams` refuses by name; `GenerationConfig` reads what checkpoints say."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import refused

from dgemma.errors import ConfigError, RequestError
from dgemma.params import PRESETS, GenerationConfig, SamplingParams

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "9", True, NAN]),
        ("min_tokens", [-1, 0.5, "a"]),
        ("seed", [-(2**63) - 1, 2**64, 1.0, "7", True]),
        ("temperature", [-0.1, NAN, INF, "hot", True]),
        ("top_p", [0, 0.0, -1, 1.01, NAN, "x"]),
        ("top_k", [0, -1, 2.0]),
        ("max_denoising_steps", [0, 1.5]),
        ("entropy_bound", [0, -1, NAN, INF]),
        ("t_min", [-1, NAN]),
        ("t_max", [-1, INF]),
        ("confidence_threshold", [0, -1]),
        ("stability_threshold", [-1, 0.5]),
        ("canvas_length", [0, "8"]),
        ("mode", ["fast", "", None]),
        ("stop", [[""], [3], [None], ["a", ""], ""]),
        ("stop_token_ids", [[-1], [1.5], ["a"], [True]]),
    ],
)
def test_bad_ranges_are_refused_by_name(name: str, values: list[Any]):
    for value in values:
        message = refused(lambda value=value: SamplingParams(**{name: value}), name, kind=RequestError)
        assert message.startswith(name)


def test_edges_that_are_allowed():
    SamplingParams(seed=-(2**63), temperature=0, top_p=1, top_k=1, min_tokens=0, t_min=0, t_max=0)
    SamplingParams(seed=2**64 - 1, stability_threshold=0, mode="autoregressive", max_new_tokens=1, canvas_length=1)


def test_stop_may_be_one_string_or_any_sequence():
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("a", "b") and params.stop_token_ids == (1, 2)
    assert hash(params) == hash(replace(params))


def test_from_dict_refuses_unknown_keys():
    assert SamplingParams.from_dict({"seed": 3}) == SamplingParams(seed=3)
    refused(lambda: SamplingParams.from_dict({"sead": 3}), "sead: no such", "seed", kind=RequestError)


def test_presets_are_valid_settings():
    for preset in PRESETS.values():
        SamplingParams.from_dict(preset).resolve(GenerationConfig())


def test_resolve_keeps_what_is_unset():
    defaults = GenerationConfig(max_new_tokens=7, entropy_bound=0.2, t_max=0.6, eos_token_ids=(5,))
    assert SamplingParams().resolve(defaults) == defaults
    merged = SamplingParams(entropy_bound=0.3, t_min=0.5, temperature=2.0).resolve(defaults)
    assert merged == replace(defaults, entropy_bound=0.3, t_min=0.5)
    assert SamplingParams(t_min=0.0, stability_threshold=0).resolve(defaults).t_min == 0.0  # 0 is a value
    refused(lambda: SamplingParams(t_min=0.7).resolve(defaults), "t_max: 0.6", "t_min 0.7", kind=RequestError)


def test_generation_config_reads_the_released_form():
    data = {
        "max_new_tokens": 100,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.25},
        "eos_token_id": [1, 106, 50],
        "bos_token_id": 2,
        "t_min": 0.3,
        "confidence_threshold": None,
        "transformers_version": "5.23.0",
    }
    config = GenerationConfig.from_dict(data)
    assert (config.max_new_tokens, config.entropy_bound, config.t_min) == (100, 0.25, 0.3)
    assert config.eos_token_ids == (1, 106, 50)
    assert config.confidence_threshold == GenerationConfig().confidence_threshold
    assert config.extra == {"transformers_version": "5.23.0"}
    assert data["eos_token_id"] == [1, 106, 50] and "sampler_config" in data  # the caller's object stays whole
    assert GenerationConfig.from_dict({"eos_token_id": 9}).eos_token_ids == (9,)


def test_generation_config_survives_a_round_trip():
    config = GenerationConfig(max_new_tokens=5, t_max=0.9, eos_token_ids=(1, 2), extra={"disable_compile": True})
    again = GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.extra == config.extra
    named = {f.name for f in fields(GenerationConfig)} - {"extra", "entropy_bound", "eos_token_ids"}
    assert named <= config.to_dict().keys()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"t_min": -1}, "t_min: -1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"entropy_bound": "much"}, "entropy_bound: 'much'"),
        ({"sampler_config": {"_cls_name": "OtherSampler"}}, "OtherSampler"),
        ({"sampler_config": {"entropy_bound": 0}}, "entropy_bound: 0"),
    ],
)
def test_generation_config_checks_what_a_file_says(tmp_path: Path, data: dict[str, Any], words: str):
    refused(lambda: GenerationConfig.from_dict(data), words, kind=ConfigError)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(data))
    refused(lambda: GenerationConfig.read(path), str(path), words, kind=ConfigError)


def test_generation_config_file(tmp_path: Path):
    path = tmp_path / "generation_config.json"
    assert GenerationConfig.read(path) == GenerationConfig()
    for content in ("", "[]", "{"):
        path.write_text(content)
        refused(lambda: GenerationConfig.read(path), str(path), kind=ConfigError)
