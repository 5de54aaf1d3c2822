"""`/v1/completions` through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from servers import SECONDS, Running


def complete(client: openai.OpenAI, prompt: Any = "once", **more: Any) -> Any:
    """One request."""
    return client.completions.create(**{"model": "fake", "prompt": prompt, **more})


def test_a_text_goes_on_raw(client: openai.OpenAI, server: Running) -> None:
    answer = complete(client, "once upon", seed=4)
    call = server.model.calls[-1]
    assert call["prompt"] == "once upon" and call["raw"] is True and call["params"].seed == 4
    assert answer.object == "text_completion" and answer.choices[0].text.startswith("Once")
    assert answer.choices[0].finish_reason == "stop" and answer.usage.prompt_tokens == len(
        server.model.tokenizer.encode("once upon")
    )
    assert answer.usage.completion_tokens == len(server.model.tokenizer.encode(answer.choices[0].text))


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        (["one", "two"], ["one", "two"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_kinds_of_prompts(client: openai.OpenAI, server: Running, prompt: Any, sent: list[Any]) -> None:
    before = len(server.model.calls)
    answer = complete(client, prompt, n=2, seed=1, max_tokens=8)
    calls = server.model.calls[before:]
    assert [call["prompt"] for call in calls] == [one for one in sent for _ in range(2)]
    assert [call["params"].seed for call in calls] == [1, 2] * len(sent)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(sent)))
    assert answer.usage.prompt_tokens == sum(
        len(one) if isinstance(one, list) else len(server.model.tokenizer.encode(one)) for one in sent
    )


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = complete(client, ["a", "b"], seed=3, logprobs=1)
    chunks = list(complete(client, ["a", "b"], seed=3, logprobs=1, stream=True, stream_options={"include_usage": True}))
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == whole.choices[index].text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        told = [choice.logprobs for choice in mine if choice.logprobs]
        joined = whole.choices[index].logprobs
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [entry for one in told for entry in getattr(one, name)] == getattr(joined, name)
    assert chunks[-1].usage == whole.usage


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = complete(client, seed=2, logprobs=3, max_tokens=10).choices[0]
    told = answer.logprobs
    assert "".join(told.tokens) == answer.text and told.token_logprobs == [-0.25] * 10
    assert [answer.text[at:].startswith(word) for at, word in zip(told.text_offset, told.tokens, strict=True)]
    assert all(len(top) == 3 for top in told.top_logprobs)
    assert complete(client).choices[0].logprobs is None


def test_drafts(client: openai.OpenAI) -> None:
    chunks = list(complete(client, stream=True, extra_body={"stream_options": {"include_drafts": True}}))
    drafts = [chunk.diffusion["draft"] for chunk in chunks if hasattr(chunk, "diffusion")]
    assert drafts and all(draft["choice"] == 0 for draft in drafts)
    assert all(chunk.choices[0].text == "" for chunk in chunks if hasattr(chunk, "diffusion"))


@pytest.mark.parametrize("best_of", [1, 3])
def test_best_of_that_asks_for_nothing(client: openai.OpenAI, best_of: int) -> None:
    assert len(complete(client, n=best_of, best_of=best_of, max_tokens=1).choices) == best_of


@pytest.mark.parametrize(("n", "best_of"), [(None, 2), (2, 3), (2, 1)])
def test_best_of_is_refused(client: openai.OpenAI, n: Any, best_of: int) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, n=n, best_of=best_of)
    assert caught.value.param == "best_of"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [["a"]], [True], [-1], 5, {}, [None], [[1], "a"]])
def test_prompts_that_are_none(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt)
    assert caught.value.param == "prompt"


def test_too_many_answers(client: openai.OpenAI, server: Running) -> None:
    before = len(server.model.calls)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, ["a"] * 9, n=16)
    assert caught.value.param == "prompt" and len(server.model.calls) == before


def test_all_choices_or_none(client: openai.OpenAI, server: Running) -> None:
    before = len(server.model.tickets)
    with pytest.raises(openai.RateLimitError):
        complete(client, ["LONG one", "LONG two", "FULL"])
    tickets = server.model.tickets[before:]
    assert len(tickets) == 2 and all(ticket.over.wait(SECONDS) and ticket.cancelled_at for ticket in tickets)
