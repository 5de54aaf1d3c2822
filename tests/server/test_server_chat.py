"""`/v1/chat/completions` through the official client."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from servers import Running

from dgemma.events import Delta

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("get_weather", "get_time")
]


def chat(client: openai.OpenAI, content: str = "hello", **more: Any) -> Any:
    """One request."""
    return client.chat.completions.create(
        **{"model": "fake", "messages": [{"role": "user", "content": content}], **more}
    )


def alone(server: Running, prompt: Any, params: Any, **options: Any) -> Any:
    """What the model says when it is asked without a server."""

    async def ask() -> Any:
        return [event async for event in server.model.submit(prompt, params, **options)][-1].result

    return asyncio.run(ask())


def test_an_answer(client: openai.OpenAI, server: Running) -> None:
    answer = chat(client, seed=5)
    call = server.model.calls[-1]
    expected = alone(server, HELLO, call["params"])
    assert call["prompt"] == HELLO and call["params"].seed == 5 and not call["think"] and not call["raw"]
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert answer.object == "chat.completion" and answer.model == "fake" and answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_") and answer._request_id.startswith("req_")
    assert answer.usage.prompt_tokens == len("hello")
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == len("hello") + len(expected.tokens)
    assert answer.usage.completion_tokens_details.denoising_steps == sum(expected.stats.steps_per_canvas)


def test_a_seed_decides(client: openai.OpenAI) -> None:
    texts = [chat(client, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_is_the_whole_answer(client: openai.OpenAI, server: Running) -> None:
    own: Any = {"seed": 3, "extra_body": {"diffusion": {"early_text": "safe"}}}
    whole = chat(client, **own)
    chunks = list(chat(client, **own, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    texts = [chunk.choices[0].delta.content for chunk in chunks[1:-1] if chunk.choices[0].delta.content]
    assert "".join(texts) == whole.choices[0].message.content
    canvases = -(-whole.usage.completion_tokens // 16)
    assert len(texts) >= 2 * canvases - 1  # one early and one at the end of each
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_whole_and_streamed_have_the_same_settings(client: openai.OpenAI, server: Running) -> None:
    whole = chat(client, seed=3)
    chunks = list(chat(client, seed=3, stream=True))
    assert server.model.calls[-1]["params"] == server.model.calls[-2]["params"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content


def test_cached_tokens(client: openai.OpenAI) -> None:
    """Those of the first choice: the others find the prompt there because of it."""
    message = [{"role": "user", "content": "SHARED beginning"}]
    answer = chat(client, messages=message, n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 6
    last = list(chat(client, messages=message, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage.prompt_tokens_details.cached_tokens == 6
    texts = client.completions.create(model="fake", prompt=["SHARED", "b", "SHARED c"], n=2)
    assert texts.usage.prompt_tokens_details.cached_tokens == 12
    response = client.responses.create(model="fake", input="SHARED d")
    assert response.usage.input_tokens_details.cached_tokens == 6
    assert client.responses.create(model="fake", input="d").usage.input_tokens_details.cached_tokens == 0


def test_no_usage_unless_asked(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_several_choices(client: openai.OpenAI, server: Running) -> None:
    answer = chat(client, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    # Choice i is what its own seed gives by itself.
    assert texts == [chat(client, seed=seed).choices[0].message.content for seed in (7, 8, 9)]
    assert answer.usage.prompt_tokens == len("hello")
    assert answer.usage.completion_tokens == sum(len(server.model.tokenizer.encode(text)) for text in texts)
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_seeds_of_choices_stay_in_range(client: openai.OpenAI, server: Running) -> None:
    chat(client, n=2, seed=2**64 - 1)
    assert [call["params"].seed for call in server.model.calls[-2:]] == [2**64 - 1, 0]


@pytest.mark.parametrize("stop", [" fox", [" hill", " fox"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, stop: Any, stream: bool) -> None:
    whole = chat(client, seed=11).choices[0].message.content
    words = [stop] if isinstance(stop, str) else stop
    expected = whole[: min(whole.index(word) for word in words if word in whole)]
    answer = chat(client, seed=11, stop=stop, stream=stream)
    if stream:
        answer = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == expected
        assert answer[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_budget(client: openai.OpenAI, name: str) -> None:
    answer = chat(client, **{name: 5})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
    *_, last = chat(client, stream=True, **{name: 5})
    assert last.choices[0].finish_reason == "length"


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = chat(client, seed=1, logprobs=True, top_logprobs=2, max_tokens=20)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.25 for entry in entries)
    assert entries[0].top_logprobs[0].token == entries[0].token and entries[0].top_logprobs[1].logprob == -1.25
    streamed = []
    for chunk in chat(client, seed=1, logprobs=True, top_logprobs=2, max_tokens=20, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == entries
    none = chat(client, logprobs=True, max_tokens=3).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in none] == [[], [], []]


def test_parts_of_characters_in_log_probabilities() -> None:
    from fake import FakeTokenizer

    from dgemma.protocol.served import Words

    words = Words(FakeTokenizer())  # type: ignore[arg-type]
    assert words.name(0xC3) == ("<0xC3>", [0xC3])
    assert words.name(ord("O")) == ("O", [ord("O")])


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_apart(client: openai.OpenAI, stream: bool) -> None:
    answer = chat(client, reasoning_effort="high", stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta for chunk in answer]
        thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        text = "".join(delta.content or "" for delta in deltas)
    else:
        thoughts, text = answer.choices[0].message.reasoning_content, answer.choices[0].message.content
        assert answer.usage.completion_tokens_details.reasoning_tokens == len("I think about 5 letters.")
    assert thoughts == "I think about 5 letters." and thoughts not in text and text.startswith("Once")


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("minimal", False), ("low", True), ("max", True)])
def test_effort(client: openai.OpenAI, server: Running, effort: Any, thinks: bool) -> None:
    chat(client, reasoning_effort=effort, max_tokens=1)
    assert server.model.calls[-1]["think"] is thinks


def test_tool_calls(client: openai.OpenAI, server: Running) -> None:
    answer = chat(client, "WEATHER", tools=TOOLS, tool_choice="auto", parallel_tool_calls=True)
    assert server.model.calls[-1]["tools"] == TOOLS
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
    assert [(call.type, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("function", name, '{"city": "Oslo"}') for name in ("get_weather", "get_time")
    ]
    assert len({call.id for call in message.tool_calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    after = [{"role": "user", "content": "WEATHER?"}, message, *results]
    assert client.chat.completions.create(model="fake", messages=after).choices[0].message.content
    sent = server.model.calls[-1]["prompt"]
    assert sent[1]["tool_calls"] == [call.model_dump() for call in message.tool_calls]
    assert sent[2:] == results


def test_tool_calls_in_a_stream(client: openai.OpenAI, server: Running) -> None:
    chunks = list(chat(client, "WEATHER", tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.type, call.function.name) for call in calls] == [
        (0, "function", "get_weather"),
        (1, "function", "get_time"),
    ]
    assert all(call.id and call.function.arguments == '{"city": "Oslo"}' for call in calls)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        model="fake", messages=[{"role": "user", "content": "WEATHER"}], tools=TOOLS
    ) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]
    # What the client's own helper made of the stream can be sent back as it is.
    results: list[Any] = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    chat(client, messages=[{"role": "user", "content": "WEATHER?"}, message.model_dump(), *results])
    call = message.tool_calls[0]
    function = {"name": "get_weather", "arguments": call.function.arguments}
    sent = server.model.calls[-1]["prompt"][1]["tool_calls"][0]
    assert sent == {"id": call.id, "type": "function", "function": function}


def test_no_tools_when_they_are_switched_off(client: openai.OpenAI, server: Running) -> None:
    answer = chat(client, "WEATHER", tools=TOOLS, tool_choice="none", parallel_tool_calls=False)
    assert server.model.calls[-1]["tools"] is None and answer.choices[0].message.content.startswith("Once")


def test_an_empty_answer(client: openai.OpenAI) -> None:
    answer = chat(client, "EMPTY")
    assert answer.choices[0].message.content == "" and answer.usage.completion_tokens == 0


def test_drafts(client: openai.OpenAI, server: Running) -> None:
    chunks = list(chat(client, seed=2, stream=True, n=2, stream_options={"include_drafts": True}))
    drafts = [chunk.diffusion["draft"] for chunk in chunks if hasattr(chunk, "diffusion")]
    for chunk in chunks:
        assert not hasattr(chunk, "diffusion") or chunk.choices[0].delta.content is None
    for choice in (0, 1):
        mine = [draft for draft in drafts if draft["choice"] == choice]
        steps = server.model.tickets[-2 + choice].steps_done
        assert len(mine) == steps and [draft["step"] for draft in mine] == [1, 2, 3, 4] * (steps // 4)
    first = drafts[0]
    length = server.model.config.canvas_length
    assert all(len(first[name]) == length for name in ("pieces", "settled", "changed", "entropies"))
    assert first["max_steps"] == 48 and first["mean_entropy"] == 1.25 and first["tokens_per_forward"] == 3.5
    assert "".join(first["pieces"]).startswith(first["text"][:3])
    whole = chat(client, seed=2).choices[0].message.content
    mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == 0]
    assert "".join(choice.delta.content or "" for choice in mine) == whole


def test_system_messages_and_parts(client: openai.OpenAI, server: Running) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "again"},
    ]
    client.chat.completions.create(model="fake", messages=messages, max_tokens=1)
    assert server.model.calls[-1]["prompt"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "hello", "name": "ann"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "again"},
    ]


def test_the_asynchronous_client(server: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="fake", messages=HELLO, seed=seed) for seed in range(8))
            )
            texts = [answer.choices[0].message.content for answer in answers]
            assert len(set(texts)) == 8
            stream = await client.chat.completions.create(model="fake", messages=HELLO, seed=5, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == texts[5]

    asyncio.run(run())


def test_models(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["fake"]
    assert listed[0].max_model_len == 4096 and listed[0].canvas_length == 16  # type: ignore[attr-defined]
    assert client.models.retrieve("fake") == listed[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("google/other")
    assert caught.value.code == "model_not_found"


def test_our_own_settings(client: openai.OpenAI, server: Running) -> None:
    own = {"max_denoising_steps": 5, "entropy_bound": 0.2, "early_text": "off", "top_k": 4, "logit_bias": {"7": 1.5}}
    chat(client, stream=True, max_tokens=2, extra_body={"diffusion": own}).close()
    params = server.model.calls[-1]["params"]
    assert params.max_denoising_steps == 5 and params.entropy_bound == 0.2 and params.top_k == 4
    assert params.early_text == "off" and params.logit_bias == ((7, 1.5),) and params.max_new_tokens == 2


def test_every_event_counts_once() -> None:
    """Growth: a Finish adds what was held back, and nothing that came before."""
    from dgemma.events import Finish, Result, Stats, ToolCall
    from dgemma.protocol.growth import Growth

    calls = (ToolCall(name="a", arguments="{}"), ToolCall(name="b", arguments="{}"))
    growth = Growth()
    piece = growth.take(Delta(canvas=0, steps=1, tokens=[1], text="ab", thoughts="x", tool_calls=calls[:1]))
    assert (piece.text, piece.thoughts, piece.tool_calls) == ("ab", "x", calls[:1])
    result = Result(
        text="abc", tokens=[1], finish_reason="stop", seed=0, stats=Stats(), thoughts="xyz", tool_calls=calls
    )
    rest = growth.take(Finish(result=result))
    assert (rest.text, rest.thoughts, rest.tool_calls) == ("c", "yz", calls[1:])
