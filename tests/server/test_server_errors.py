"""What is refused, and how: OpenAI's errors, typed by the official client; never 500 for what a client sends."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake import FakeModel
from servers import SECONDS, Running

from dgemma.protocol.body import MAX_DEPTH

HELLO = [{"role": "user", "content": "hello"}]
ENDPOINTS = ("chat/completions", "completions", "responses")


def post(server: Running, body: Any, path: str = "chat/completions", **more: Any) -> httpx.Response:
    """A request without the client's help. `body`: bytes as they are, or what is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(f"/v1/{path}", content=data, **{"headers": {"content-type": "application/json"}, **more})


def chat(content: str = "hello", **more: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **more}


def refused(response: httpx.Response, status: int = 400) -> Any:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"]
    return error


def test_what_is_wrong_is_said_plainly(client: openai.OpenAI) -> None:
    for more, message in (
        ({"messages": []}, "messages: needs to have at least 1 item, not 0"),
        ({"stop": ""}, "stop[0]: needs to have at least 1 character"),
        ({"n": 0}, "n: needs to be greater than or equal to 1"),
        ({"seed": 1.0}, "seed: needs to be a valid integer"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "fake", "messages": HELLO, **more})  # type: ignore[arg-type]
        assert caught.value.body["message"] == message  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "more", "param"),
    [
        (openai.BadRequestError, {"temperature": 3}, "temperature"),
        (openai.BadRequestError, {"n": 0}, "n"),
        (openai.BadRequestError, {"n": 17}, "n"),
        (openai.BadRequestError, {"top_p": 0}, "top_p"),
        (openai.BadRequestError, {"seed": 2**64}, "seed"),
        (openai.BadRequestError, {"max_tokens": 0}, "max_tokens"),
        (openai.BadRequestError, {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        (openai.BadRequestError, {"stop": ""}, "stop[0]"),
        (openai.BadRequestError, {"logit_bias": {"1": 101}}, "logit_bias[1]"),
        (openai.BadRequestError, {"logit_bias": {"x": 1}}, "logit_bias"),
        (openai.BadRequestError, {"logit_bias": {"900": 1}}, "logit_bias"),
        (openai.BadRequestError, {"top_logprobs": 2}, "top_logprobs"),
        (openai.BadRequestError, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (openai.BadRequestError, {"stream_options": {"include_usage": True}}, "stream_options"),
        (openai.BadRequestError, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (openai.BadRequestError, {"metadata": {"a" * 65: "b"}}, "metadata." + "a" * 64),
        (openai.BadRequestError, {"extra_body": {"nonsense": 1}}, "nonsense"),
        (openai.BadRequestError, {"extra_body": {"top_k": 1}}, "top_k"),
        (openai.BadRequestError, {"extra_body": {"diffusion": {"nonsense": 1}}}, "diffusion.nonsense"),
        (openai.BadRequestError, {"extra_body": {"diffusion": {"entropy_bound": 0}}}, "diffusion.entropy_bound"),
        (openai.BadRequestError, {"extra_body": {"diffusion": {"top_k": "a"}}}, "diffusion.top_k"),
        (openai.BadRequestError, {"seed": 1, "extra_body": {"diffusion": {"seed": 1}}}, "diffusion.seed"),
        (openai.BadRequestError, {"max_tokens": 1, "extra_body": {"diffusion": {"max_new_tokens": 1}}},
         "diffusion.max_new_tokens"),
        (openai.BadRequestError, {"messages": []}, "messages"),
        (openai.BadRequestError, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        (openai.BadRequestError, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (openai.BadRequestError, {"messages": [*HELLO, {"role": "system", "content": "a"}]}, "messages[1].role"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "a", "mood": "b"}]}, "messages[0].mood"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:"}}]}]}, "messages[0].content[0].type"),
        (openai.BadRequestError, {"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools[0].function.name"),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
         "tools[0].function.strict"),
        (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "a"}}],
                                  "parallel_tool_calls": False}, "parallel_tool_calls"),
        (openai.NotFoundError, {"model": "gpt-6"}, "model"),
    ],
)  # fmt: skip
def test_refused_by_name(client: openai.OpenAI, server: Running, kind: Any, more: dict[str, Any], param: str) -> None:
    before = len(server.model.tickets)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": HELLO, **more})
    assert caught.value.param == param and param.split("[")[0] in caught.value.message
    assert len(server.model.tickets) == before


@pytest.mark.parametrize(
    ("word", "kind", "status", "param", "code"),
    [
        ("FULL", openai.RateLimitError, 429, None, "rate_limit_exceeded"),
        ("DRAINING", openai.InternalServerError, 503, None, "draining"),
        ("TOOLONG", openai.BadRequestError, 400, "messages", "context_length_exceeded"),
        ("REFUSE", openai.BadRequestError, 400, "diffusion.max_denoising_steps", "invalid_value"),
        ("CANNOT", openai.BadRequestError, 400, "max_tokens", "invalid_value"),
        ("NAN", openai.BadRequestError, 400, None, "generation_failed"),
        ("CRASH", openai.InternalServerError, 500, None, "internal_error"),
    ],
)
def test_errors_of_the_engine(
    client: openai.OpenAI, word: str, kind: Any, status: int, param: str | None, code: str
) -> None:
    for stream in (False, True) if word not in ("NAN", "CRASH") else (False,):
        with pytest.raises(kind) as caught:
            client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": word}], max_tokens=30, stream=stream
            )
        error = caught.value
        assert (error.status_code, error.param, error.code) == (status, param, code)
        assert ("retry-after" in error.response.headers) == (status in (429, 503))
        assert word not in str(error.body)


@pytest.mark.parametrize("word", ["NAN", "CRASH"])
def test_an_error_in_mid_stream(client: openai.OpenAI, server: Running, word: str) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": word}], stream=True, n=2
    )
    texts = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            texts.append(chunk.choices[0].delta.content)
    assert any(texts) and caught.value.code == ("generation_failed" if word == "NAN" else "internal_error")
    assert all(ticket.over.wait(SECONDS) for ticket in server.model.tickets)


def test_a_key(start: Callable[..., Running]) -> None:
    server = start(api_key="secret")
    for wrong in ("none", "secre", "secret2"):
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key=wrong).models.list()
        assert caught.value.code == "invalid_api_key"
    for given in (b"", b"secret", b"Basic secret", b"Bearer", b"Bearer s\xe9cret", b"Bearer " + b"secret" * 2):
        refused(server.http.get("/v1/models", headers={"authorization": given}), 401)
    assert server.client(api_key="secret").models.list().data
    for path in ("/health", "/metrics", "/openapi.json"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/").status_code in (200, 404)
    for path in ("/v1/models", "/v1/nowhere", "/v1/responses/resp_1"):
        response = server.http.get(path)
        refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ENDPOINTS:
        refused(post(server, chat(), path), 401)
    assert not server.model.calls


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"5", b'"a"', b"{'a': 1}", b'{"a": 1}}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
        b'{"model": "f\xe9"}', json.dumps(chat()).encode("utf-16"), json.dumps(chat()).encode("utf-32"),
        b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"temperature": -Infinity}',
        b'{"temperature": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}", b'{"seed": 1, "seed": 2}',
        b'{"messages": "\\ud800"}', b'{"\\udff": 1}', b'{"a": ' * 500 + b"1" + b"}" * 500, b"[" * 100_000,
        b'{"model": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", b'{"a": "\n"}', b'{"a": 01}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ENDPOINTS)
def test_bodies_that_are_no_request(server: Running, body: bytes, path: str) -> None:
    refused(post(server, body, path))


def test_deep_schemas_are_fine(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(12):
        schema = {"type": "object", "properties": {"a": schema}}
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert client.chat.completions.create(model="fake", messages=HELLO, tools=tools).choices  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_other_content_types(server: Running, kind: str | None) -> None:
    refused(post(server, chat(), headers={"content-type": kind} if kind else {}), 415)


def test_content_type_with_parameters(server: Running) -> None:
    assert post(server, chat(), headers={"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large(start: Callable[..., Running], chunked: bool) -> None:
    server = start(max_body_bytes=10_000)
    small, large = json.dumps(chat("a" * 9000)).encode(), json.dumps(chat("a" * 3_000_000)).encode()
    for data, status in ((small, 400), (large, 413), (small, 400)):  # 9000 tokens are more than its context
        pieces = iter([data[at : at + 65536] for at in range(0, len(data), 65536)]) if chunked else data
        headers = {"content-type": "application/json"}
        response = server.http.post("/v1/chat/completions", content=pieces, headers=headers)
        refused(response, status)
    assert len(server.model.calls) == 2


def test_a_body_too_large_by_its_own_words(start: Callable[..., Running]) -> None:
    """The length alone decides; nothing of the body is waited for longer than it takes to answer."""
    server = start(max_body_bytes=1000)
    for length in ("1001", "9" * 30):
        with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as connection:
            head = "POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n{{".encode())
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(65536)
        assert not answer or answer.split()[1] in (b"413", b"400")


def test_unknown_paths_and_methods(server: Running) -> None:
    paths = ("/nope", "/v1", "/v1/", "/v1/chat", "/v1/models/", "/docs", "/v1/embeddings", "/health/", "/%00")
    for path in paths:
        assert refused(server.http.get(path), 404)["message"]
    for method, path in (("GET", "/v1/chat/completions"), ("PUT", "/v1/responses"), ("POST", "/health"),
                         ("DELETE", "/v1/models"), ("PATCH", "/v1/completions"), ("POST", "/")):  # fmt: skip
        response = server.http.request(method, path)
        assert refused(response, 405)["code"] == "method_not_allowed" and response.headers["allow"]


def test_a_request_that_takes_too_long(start: Callable[..., Running]) -> None:
    server = start(FakeModel(hold=6), request_seconds=0.4)
    client = server.client()
    long: Any = {"model": "fake", "messages": [{"role": "user", "content": "LONG"}]}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**long)
    assert caught.value.status_code == 504 and caught.value.code == "timeout"
    with pytest.raises(openai.APIError) as cut:
        list(client.chat.completions.create(**long, stream=True))
    assert cut.value.code == "timeout"
    assert all(ticket.over.wait(SECONDS) and ticket.cancelled_at for ticket in server.model.tickets)


def test_other_origins(start: Callable[..., Running], server: Running) -> None:
    """Closed unless opened; and a browser asks before it sends JSON, so a page elsewhere cannot use the server."""
    ask = {"origin": "https://page.example", "access-control-request-method": "POST",
           "access-control-request-headers": "content-type,authorization"}  # fmt: skip
    closed = server.http.options("/v1/chat/completions", headers=ask)
    assert closed.status_code == 405 and "access-control-allow-origin" not in closed.headers
    opened = start(api_key="secret", allow_origins=("https://page.example",))
    answer = opened.http.options("/v1/chat/completions", headers=ask)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"
    other = opened.http.options("/v1/chat/completions", headers={**ask, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    wrong = opened.http.get("/v1/models", headers={"origin": "https://page.example"})
    assert wrong.status_code == 401 and wrong.headers["access-control-allow-origin"] == "https://page.example"
