"""Every field of the published request schemas is honoured or refused by name; nothing is silently ignored.

The fields are those of the official client's types, so that a new one fails here until something is decided.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from servers import Running

from dgemma.params import SamplingParams
from dgemma.protocol.chat_schema import ChatRequest
from dgemma.protocol.completions_schema import CompletionRequest
from dgemma.protocol.fields import Diffusion, Only
from dgemma.protocol.responses_schema import ResponseRequest

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
LOGPROBS = "message.output_text.logprobs"

# path: (form, the published types, a body that is good)
ENDPOINTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chat/completions": (
        ChatRequest,
        (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming),
        {"model": "fake", "messages": [{"role": "user", "content": "EMPTY"}]},
    ),
    "completions": (
        CompletionRequest,
        (
            completion_create_params.CompletionCreateParamsNonStreaming,
            completion_create_params.CompletionCreateParamsStreaming,
        ),
        {"model": "fake", "prompt": "EMPTY"},
    ),
    "responses": (
        ResponseRequest,
        (response_params.ResponseCreateParamsNonStreaming, response_params.ResponseCreateParamsStreaming),
        {"input": "EMPTY"},
    ),
}

# Honoured: what is sent, and what must come of it: a field of SamplingParams, or of the call, or of the answer.
COMMON: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.5, "params.temperature", 0.5),
    "top_p": (0.5, "params.top_p", 0.5),
    "user": ("ann", "", None),  # changes nothing in an answer
    "stream": (True, "stream", True),
    "diffusion": ({"top_k": 3}, "params.top_k", 3),
}
CHATTY: dict[str, tuple[Any, str, Any]] = {
    "safety_identifier": ("ann", "", None),
    "prompt_cache_key": ("ann", "", None),
    "metadata": ({"a": "b"}, "answer.metadata", {"a": "b"}),
    "parallel_tool_calls": (True, "", None),
}
HONOURED: dict[str, dict[str, tuple[Any, str, Any]]] = {
    "chat/completions": {
        **COMMON,
        **CHATTY,
        "messages": ([{"role": "user", "content": "a"}], "call.prompt", [{"role": "user", "content": "a"}]),
        "model": ("fake", "answer.model", "fake"),
        "logit_bias": ({"5": 2}, "params.logit_bias", ((5, 2.0),)),
        "logprobs": (True, "params.logprobs", 0),
        "top_logprobs": (3, "params.logprobs", 3),
        "max_tokens": (3, "params.max_new_tokens", 3),
        "max_completion_tokens": (3, "params.max_new_tokens", 3),
        "n": (2, "choices", 2),
        "reasoning_effort": ("high", "call.think", True),
        "seed": (4, "params.seed", 4),
        "stop": (["x"], "params.stop", ("x",)),
        "stream_options": ({"include_drafts": True}, "call.drafts", True),
        "tools": ([TOOL], "call.tools", [TOOL]),
    },
    "completions": {
        **COMMON,
        "model": ("fake", "answer.model", "fake"),
        "prompt": ("a", "call.prompt", "a"),
        "best_of": (2, "choices", 2),
        "logit_bias": ({"5": 2}, "params.logit_bias", ((5, 2.0),)),
        "logprobs": (3, "params.logprobs", 3),
        "max_tokens": (3, "params.max_new_tokens", 3),
        "n": (2, "choices", 2),
        "seed": (4, "params.seed", 4),
        "stop": ("x", "params.stop", ("x",)),
        "stream_options": ({"include_drafts": True}, "call.drafts", True),
    },
    "responses": {
        **COMMON,
        **CHATTY,
        "user": ("ann", "answer.user", "ann"),
        "safety_identifier": ("ann", "answer.safety_identifier", "ann"),
        "prompt_cache_key": ("ann", "answer.prompt_cache_key", "ann"),
        "input": ("a", "call.prompt", [{"role": "user", "content": "a"}]),
        "model": ("fake", "answer.model", "fake"),
        "include": ([LOGPROBS], "params.logprobs", 0),
        "instructions": (
            "b",
            "call.prompt",
            [{"role": "system", "content": "b"}, {"role": "user", "content": "EMPTY"}],
        ),
        "max_output_tokens": (3, "params.max_new_tokens", 3),
        "previous_response_id": ("resp_nowhere", "404", None),
        "reasoning": ({"effort": "low"}, "call.think", True),
        "store": (False, "answer.store", False),
        "stream_options": ({"include_drafts": True}, "call.drafts", True),
        "text": ({"format": {"type": "text"}, "verbosity": "medium"}, "", None),
        "tools": (
            [FLAT_TOOL],
            "call.tools",
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        ),
        "top_logprobs": (2, "params.logprobs", 2),
    },
}
BESIDE: dict[str, dict[str, Any]] = {
    "chat/completions/top_logprobs": {"logprobs": True},
    "chat/completions/stream_options": {"stream": True},
    "completions/stream_options": {"stream": True},
    "completions/best_of": {"n": 2},
    "responses/stream_options": {"stream": True},
    "responses/top_logprobs": {"include": [LOGPROBS]},
}
# Refused: values that ask for something; what asks for nothing is in the schema itself.
PENALTIES = [0.5, -2, True, "0"]
TIERS = ["flex", "priority", "scale", "fast"]
FORCED = ["required", {"type": "function", "name": "f"}, {"type": "function", "function": {"name": "f"}}]
CACHE = [{"mode": "explicit"}, {"ttl": "30m"}, {}]
REFUSED: dict[str, dict[str, list[Any]]] = {
    "chat/completions": {
        "audio": [{"voice": "alloy", "format": "wav"}],
        "frequency_penalty": PENALTIES,
        "presence_penalty": PENALTIES,
        "function_call": ["auto", {"name": "f"}],
        "functions": [[{"name": "f"}]],
        "modalities": [["audio"], ["text", "audio"], []],
        "moderation": [{"model": "m"}],
        "prediction": [{"type": "content", "content": "a"}],
        "prompt_cache_options": CACHE,
        "prompt_cache_retention": ["24h"],
        "response_format": [
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        ],
        "service_tier": TIERS,
        "store": [True, 0],
        "tool_choice": [*FORCED, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}],
        "verbosity": ["low", "high"],
        "web_search_options": [{}, {"search_context_size": "low"}],
    },
    "completions": {
        "echo": [True],
        "frequency_penalty": PENALTIES,
        "presence_penalty": PENALTIES,
        "suffix": ["b"],
    },
    "responses": {
        "access_programs": [{"cyber": "standard"}],
        "background": [True],
        "background_options": [{"completion_window": "2h"}],
        "context_management": [[{"type": "compaction"}]],
        "conversation": ["conv_1", {"id": "conv_1"}],
        "image": [{"context_compression": "auto"}],
        "max_tool_calls": [3],
        "moderation": [{"model": "m"}],
        "prompt": [{"id": "p"}],
        "prompt_cache_options": CACHE,
        "prompt_cache_retention": ["24h"],
        "service_tier": TIERS,
        "tool_choice": FORCED,
        "truncation": ["auto"],
    },
}
CASES = [(path, name) for path in ENDPOINTS for name in HONOURED[path]]


def published(path: str) -> set[str]:
    """Names of the published fields."""
    return {name for kind in ENDPOINTS[path][1] for name in get_type_hints(kind)}


def post(server: Running, path: str, **more: Any) -> httpx.Response:
    """The endpoint's good body with more fields."""
    return server.http.post(f"/v1/{path}", json={**ENDPOINTS[path][2], **more})


@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_published_field_has_its_place(path: str) -> None:
    ours = {"diffusion"}
    assert (
        published(path) | ours == set(ENDPOINTS[path][0].model_fields) == HONOURED[path].keys() | REFUSED[path].keys()
    )
    assert not HONOURED[path].keys() & REFUSED[path].keys()


@pytest.mark.parametrize(("path", "name"), CASES)
def test_honoured(path: str, name: str, server: Running) -> None:
    value, where, expected = HONOURED[path][name]
    before = len(server.model.calls)
    response = post(server, path, **{name: value, **BESIDE.get(f"{path}/{name}", {})})
    assert response.status_code == (404 if where == "404" else 200), response.text
    calls = server.model.calls[before:]
    kind, _, field = where.partition(".")
    if kind == "params":
        assert getattr(calls[0]["params"], field) == expected
    elif kind == "call":
        assert calls[0][field] == expected
    elif kind == "answer":
        assert response.json()[field] == expected
    elif kind == "choices":
        assert len(response.json()["choices"]) == expected
    elif kind == "stream":
        assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_null_is_as_good_as_left_out(path: str, server: Running) -> None:
    form, _, body = ENDPOINTS[path]
    plain = server.model.calls
    assert post(server, path).status_code == 200
    assert post(server, path, **{name: None for name in form.model_fields if name not in body}).status_code == 200
    assert {**plain[-1], "prompt": None} == {**plain[-2], "prompt": None}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in ENDPOINTS for name in REFUSED[path]])
def test_refused_by_name(path: str, name: str, server: Running) -> None:
    before = len(server.model.calls)
    for value in REFUSED[path][name]:
        response = post(server, path, **{name: value})
        assert response.status_code == 400, (value, response.text)
        error = response.json()["error"]
        assert error["param"] == name and error["code"] == "unsupported_value"
        assert error["message"].startswith(f"{name}: is not supported: ") and error["type"] == "invalid_request_error"
    assert len(server.model.calls) == before
    rule = next(one for one in ENDPOINTS[path][0].model_fields[name].metadata if isinstance(one, Only))
    for value in rule.allowed:
        assert post(server, path, **{name: value}).status_code == 200, value


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_missing_is_named(path: str, server: Running) -> None:
    form, _, body = ENDPOINTS[path]
    for name, field in form.model_fields.items():
        assert (name in body) >= field.is_required()
        if field.is_required():
            less = {key: value for key, value in body.items() if key != name}
            error = server.http.post(f"/v1/{path}", json=less).json()["error"]
            assert (error["param"], error["code"]) == (name, "missing_required_parameter")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_types_are_not_bent(path: str, server: Running) -> None:
    """A text is no number, a number no truth value, an object no list."""
    for name in ENDPOINTS[path][0].model_fields:
        for wrong in ("\x00", 3.5, -1, [[[]]], {"\x00": {}}, "1"):
            response = post(server, path, **{name: wrong})
            if response.status_code == 400:
                assert response.json()["error"]["param"].split("[")[0].split(".")[0] == name
            else:
                assert response.status_code in (200, 404), response.text
                honoured = HONOURED[path].get(name)
                assert honoured and (isinstance(wrong, str) or name in ("input", "seed", "temperature")), (name, wrong)


def test_our_own_settings_are_the_librarys() -> None:
    assert set(Diffusion.model_fields) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_document_describes_the_requests(path: str, server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    body = document["paths"][f"/v1/{path}"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["additionalProperties"] is False and body["required"] is True
    assert set(schema["properties"]) == set(ENDPOINTS[path][0].model_fields)
    for name in REFUSED[path]:
        assert set(schema["properties"][name]) >= {"enum", "description"}
    references = [part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]]
    assert set(references) <= set(document["components"]["schemas"])
