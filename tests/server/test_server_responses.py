"""`/v1/responses` through the official client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from servers import Running

from dgemma.protocol import ApiError
from dgemma.server.store import Store

TOOLS: list[Any] = [
    {"type": "function", "name": name, "description": "d", "parameters": {"type": "object"}, "strict": False}
    for name in ("get_weather", "get_time")
]
THINK: Any = {"effort": "high", "summary": "auto"}


def respond(client: openai.OpenAI, asked: Any = "hello", **more: Any) -> Any:
    """One turn; the seed is ours to set."""
    more["extra_body"] = {"diffusion": {"seed": 1}, **more.get("extra_body", {})}
    return client.responses.create(model="fake", input=asked, **more)


def test_a_response(client: openai.OpenAI, server: Running) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=500, temperature=0.5)
    call = server.model.calls[-1]
    assert call["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert call["params"].max_new_tokens == 500 and call["params"].temperature == 0.5
    chat = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hello"}], seed=1, temperature=0.5
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "completed" and answer.object == "response" and answer.id.startswith("resp_")
    assert [item.type for item in answer.output] == ["message"] and answer.output[0].role == "assistant"
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer.usage.total_tokens == chat.usage.total_tokens
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief." and answer.temperature == 0.5
    assert answer.error is None and answer.incomplete_details is None and answer.completed_at >= answer.created_at


def test_a_budget_leaves_it_incomplete(client: openai.OpenAI) -> None:
    answer = respond(client, max_output_tokens=5)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete" and answer.usage.output_tokens == 5
    *_, last = respond(client, max_output_tokens=5, stream=True)
    assert last.type == "response.incomplete" and last.response.status == "incomplete"


def test_the_published_events_in_their_order(client: openai.OpenAI) -> None:
    events = list(respond(client, reasoning=THINK, stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    grouped = [kind for at, kind in enumerate(kinds) if at == 0 or kind != kinds[at - 1]]
    assert grouped == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    final = events[-1].response
    assert kinds.count("response.output_text.delta") > 2
    assert [item.type for item in final.output] == ["reasoning", "message"]
    for index, item in enumerate(final.output):
        mine = [event for event in events if getattr(event, "output_index", None) == index]
        text = "".join(event.delta for event in mine if event.type.endswith(".delta"))
        done = next(event.text for event in mine if event.type.endswith("text.done"))
        assert text == done == item.content[0].text
        assert mine[0].item.id == item.id and mine[0].item.status == "in_progress"
        assert mine[-1].item == item and item.status == "completed"
        assert all(event.item_id == item.id for event in mine if hasattr(event, "item_id"))
    assert final.output[0].content[0].text == "I think about 5 letters."
    whole = respond(client, reasoning=THINK)
    assert whole.output_text == final.output_text and whole.usage == final.usage


def test_the_clients_own_accumulation(server: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            async with client.responses.stream(model="fake", input="WEATHER", tools=TOOLS, reasoning=THINK) as stream:
                kinds = [event.type async for event in stream]
                final = await stream.get_final_response()
            assert "response.function_call_arguments.done" in kinds
            assert [item.type for item in final.output] == ["reasoning", "function_call", "function_call"]

    asyncio.run(run())


def test_tool_calls_and_their_results(client: openai.OpenAI, server: Running) -> None:
    first = respond(client, "WEATHER", tools=TOOLS, tool_choice="auto")
    sent = server.model.calls[-1]["tools"]
    assert sent[0] == {
        "type": "function",
        "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}},
    }
    calls = [item for item in first.output if item.type == "function_call"]
    assert [(call.name, call.arguments, call.status) for call in calls] == [
        (name, '{"city": "Oslo"}', "completed") for name in ("get_weather", "get_time")
    ]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    expected = [
        {"role": "user", "content": "WEATHER"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ],
        },
        *({"role": "tool", "tool_call_id": call.call_id, "content": "rain"} for call in calls),
    ]

    def said() -> list[dict[str, Any]]:
        """The last prompt, without contents that are nothing."""
        prompt = server.model.calls[-1]["prompt"]
        return [{key: value for key, value in message.items() if value} for message in prompt]

    # Over the store, and with every item sent back as the client has it.
    respond(client, results, previous_response_id=first.id, tools=TOOLS)
    assert said() == expected
    back: list[Any] = [{"role": "user", "content": "WEATHER"}, *first.output, *results]
    assert respond(client, back, tools=TOOLS).output_text
    assert said() == expected


def test_a_conversation_over_the_store(client: openai.OpenAI, server: Running) -> None:
    first = respond(client, "one", instructions="Be brief.", reasoning=THINK)
    second = respond(client, [{"role": "user", "content": "two"}], previous_response_id=first.id)
    assert second.previous_response_id == first.id
    thoughts = first.output[0].content[0].text
    expected = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.output_text, "reasoning_content": thoughts},
        {"role": "user", "content": "two"},
    ]
    assert server.model.calls[-1]["prompt"] == expected  # the instructions were the first turn's own
    events = list(respond(client, "three", previous_response_id=second.id, instructions="New.", stream=True))
    assert server.model.calls[-1]["prompt"] == [
        {"role": "system", "content": "New."},
        *expected,
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "three"},
    ]
    assert client.responses.retrieve(events[-1].response.id) == events[-1].response
    # A branch off the first turn does not know the second.
    respond(client, "other", previous_response_id=first.id)
    assert [message["content"] for message in server.model.calls[-1]["prompt"]] == ["one", first.output_text, "other"]


def test_items_as_input(client: openai.OpenAI, server: Running) -> None:
    respond(
        client,
        [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {
                "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "d"}]},
        ],
        instructions="Be kind.",
    )  # fmt: skip
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert server.model.calls[-1]["prompt"] == [
        {"role": "system", "content": "Be kind.\n\nBe brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "d"},
    ]


def test_thoughts_without_an_answer(client: openai.OpenAI, server: Running) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    respond(client, [thought, {"role": "user", "content": "go on"}])
    assert server.model.calls[-1]["prompt"] == [
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "user", "content": "go on"},
    ]
    for asked in ([thought], [{"type": "reasoning", "id": "rs_1", "summary": []}]):
        with pytest.raises(openai.BadRequestError) as caught:
            respond(client, asked, instructions="Be brief.")
        assert caught.value.param == "input"


def test_what_is_kept_can_be_had_and_deleted(client: openai.OpenAI) -> None:
    kept = respond(client)
    assert client.responses.retrieve(kept.id) == kept
    client.responses.delete(kept.id)
    for forgotten in (kept.id, "resp_never", respond(client, store=False).id):
        for use in (
            lambda: client.responses.retrieve(forgotten),  # noqa: B023
            lambda: client.responses.delete(forgotten),  # noqa: B023
            lambda: respond(client, previous_response_id=forgotten),  # noqa: B023
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                use()
            assert caught.value.code == "response_not_found" and forgotten in caught.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        list(client.responses.retrieve(respond(client).id, stream=True))
    assert refused.value.param == "stream"


def test_the_oldest_is_forgotten(start: Callable[..., Running]) -> None:
    client = start(max_responses=2).client()
    ids = [respond(client).id for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[0])
    assert client.responses.retrieve(ids[1]).id == ids[1]
    ids.append(respond(client).id)  # the second was just asked for, so the third goes
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[2])
    assert client.responses.retrieve(ids[1]).id == ids[1]


def test_the_store_keeps_to_its_bytes() -> None:
    store = Store(max_entries=1000, max_bytes=10_000)
    for number in range(100):
        store.put({"id": str(number)}, [{"role": "user", "content": "x" * 900}])
    kept = []
    for number in range(100):
        try:
            kept.append(store.get(str(number)).response["id"])
        except ApiError as error:
            assert error.status == 404
    assert kept == [str(number) for number in range(90, 100)]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = respond(client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=9)
    entries = answer.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == answer.output_text and len(entries) == 9
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    streamed = []
    for event in respond(
        client, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=9, stream=True
    ):
        if event.type == "response.output_text.delta":
            streamed += [entry.token for entry in event.logprobs]
    assert streamed == [entry.token for entry in entries]


def test_drafts(client: openai.OpenAI) -> None:
    events = list(respond(client, stream=True, extra_body={"stream_options": {"include_drafts": True}}))
    drafts = [event for event in events if event.type == "response.diffusion.draft"]
    assert drafts and drafts[0].diffusion["draft"]["step"] == 1  # type: ignore[attr-defined]
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("word", ["NAN", "CRASH"])
def test_a_failure_in_mid_stream(client: openai.OpenAI, word: str) -> None:
    events = list(respond(client, word, stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error" and word not in events[-1].response.error.message
    assert events[-1].response.output[0].content[0].text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(events[0].response.id)


def test_an_empty_answer_is_an_answer(client: openai.OpenAI) -> None:
    answer = respond(client, "EMPTY")
    assert answer.status == "completed" and answer.output_text == "" and answer.output[0].type == "message"
    assert [event.type for event in respond(client, "EMPTY", stream=True)].count("response.output_item.done") == 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"asked": []}, "input"),
        ({"asked": ""}, "input"),
        ({"asked": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"asked": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"asked": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type"),
        ({"asked": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "input"),
        ({"asked": "TOOLONG"}, "input"),
        ({"asked": "CANNOT", "max_output_tokens": 1}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a", "parameters": {}, "strict": True}]}, "tools[0].strict"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"extra_body": {"seed": 1}}, "seed"),
    ],
)  # fmt: skip
def test_refused_by_name(client: openai.OpenAI, more: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, more.pop("asked", "hello"), **more)
    assert caught.value.param == param
