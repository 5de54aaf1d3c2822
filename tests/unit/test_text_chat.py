"""Chat templates, their errors, and messages that try to be more than messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import refused
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import ALPHABET, CONTROLS, FAMILIES, byte_level, gemma_like

from dgemma.errors import RequestError
from dgemma.text import ChatTemplate, Tokenizer, check_messages

Family = Callable[[], Tokenizer]
SOURCE = """
{{- bos_token -}}
{%- if tools %}{{ '<|turn>system\\n' + tools | tojson + '<turn|>\\n' }}{% endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '<|tool_call>call:' + call.function.name + '{' -}}
        {%- for key, value in call.function.arguments.items() -%}
            {{- key + ':<|"|>' + value + '<|"|>' -}}
        {%- endfor -%}
        {{- '}<tool_call|>' -}}
    {%- endfor -%}
    {{- message.content or '' -}}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking -%}
        {{- '<|channel>thought\\n<channel|>' -}}
    {%- endif -%}
{%- endif -%}
"""
TEMPLATE = ChatTemplate(SOURCE, variables={"bos_token": "<bos>"})
HELLO = [{"role": "user", "content": "hello"}]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}],
}


def test_render():
    messages = [{"role": "system", "content": "be"}, *HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    turns = (
        "<bos><|turn>system\nbe<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n<|turn>user\nhello<turn|>\n"
    )
    assert TEMPLATE.render(messages, think=True) == turns + "<|turn>model\n"
    assert TEMPLATE.render(messages) == turns + "<|turn>model\n<|channel>thought\n<channel|>"
    assert TEMPLATE.render(messages, add_generation_prompt=False) == turns
    assert TEMPLATE.render(HELLO, tools=[{"name": "é<'&"}]).startswith('<bos><|turn>system\n[{"name": "é<\'&"}]<turn|>')


@pytest.mark.parametrize("family", [gemma_like, byte_level])
def test_encoding_harmless_messages_is_encoding_the_rendered_text(family: Family):
    messages = [*HELLO, CALL, {"role": "tool", "content": "日本語 🙂", "tool_call_id": "1"}]
    rendered = TEMPLATE.render(messages, tools=[{"name": "f"}])
    assert TEMPLATE.encode(family(), messages, tools=[{"name": "f"}]) == family().encode(rendered)


texts = st.lists(st.sampled_from([*ALPHABET, *CONTROLS, "<bos>", "\U000f0000", "\U000f0001"])).map("".join)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@given(user=texts, tool=texts, argument=texts, key=texts)
def test_messages_cannot_write_control_tokens(family: Family, user: str, tool: str, argument: str, key: str):
    """The control tokens of the prompt are those of the same conversation with harmless texts, and nothing is lost."""
    tokenizer = family()

    def conversation(
        user: str, tool: str, argument: str, key: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        call = {"function": {"name": "f", "arguments": {key: argument}}}
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": tool},
        ]
        return messages, [{"name": argument}]

    def controls(ids: list[int]) -> list[str]:
        return [str(tokenizer.token_of(i)) for i in ids if tokenizer.token_of(i) in tokenizer.controls]

    messages, tools = conversation(user, tool, argument, key)
    harmless, names = conversation("a", "a", "a", "a")
    ids = TEMPLATE.encode(tokenizer, messages, tools=tools)
    assert controls(ids) == controls(TEMPLATE.encode(tokenizer, harmless, tools=names))
    if family is not FAMILIES["llama"]:
        assert tokenizer.decode(ids, keep_special=True) == TEMPLATE.render(messages, tools=tools)


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "user", "content": "<|turn>"}]
    TEMPLATE.encode(gemma_like(), messages)
    assert messages == [{"role": "user", "content": "<|turn>"}]


def test_read(tmp_path: Path):
    assert ChatTemplate.read(tmp_path) is None
    settings: dict[str, Any] = {"bos_token": {"content": "<bos>", "special": True}, "eos_token": "<eos>", "n_token": 3}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    assert ChatTemplate.read(tmp_path) is None

    def rendered() -> str:
        template = ChatTemplate.read(tmp_path)
        assert template is not None
        return template.render(HELLO)

    source = "{{ bos_token }}{{ eos_token }}{{ n_token is defined }}"
    path.write_text(json.dumps(settings | {"chat_template": "one " + source}))
    assert rendered() == "one <bos><eos>False"
    path.write_text(json.dumps(settings | {"chat_template": [{"name": "rag", "template": "x"}]}))
    assert ChatTemplate.read(tmp_path) is None
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "two " + source}]
    path.write_text(json.dumps(settings | {"chat_template": named}))
    assert rendered() == "two <bos><eos>False"
    (tmp_path / "chat_template.jinja").write_text("three é " + source, encoding="utf-8")
    assert rendered() == "three é <bos><eos>False"


def test_damaged_files(tmp_path: Path):
    path = tmp_path / "tokenizer_config.json"
    for content in ("", "[]", '{"chat_template": 3}', "[" * 100_000):
        path.write_text(content)
        refused(lambda: ChatTemplate.read(tmp_path), str(path))
    path.unlink()
    path = tmp_path / "chat_template.jinja"
    path.write_text("{{ a }}\n{% for %}")
    refused(lambda: ChatTemplate.read(tmp_path), str(path), "line 2")
    path.write_bytes(b"\xff\xfe\xff")
    refused(lambda: ChatTemplate.read(tmp_path), str(path), "UTF-8")


def test_what_templates_expect_of_transformers():
    def render(source: str, **options: Any) -> str:
        return ChatTemplate(source).render(HELLO, **options)

    assert render("{{ ['é', '<&\\''] | tojson }}") == '["é", "<&\'"]'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}") == json.dumps({"b": 1, "a": [2]}, indent=2)
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "1"
    assert render("  {% if true %}\n  yes\n  {% endif %}\n") == "  yes\n"  # blocks leave no lines behind
    assert render("{{ tools is none }} {{ enable_thinking }}", think=True) == "True True"
    refused(lambda: render("{{ raise_exception('roles must\nalternate') }}"), "roles must alternate", kind=RequestError)
    refused(lambda: render("{{ messages[0].nothing.at_all }}"), "chat template", "nothing", kind=RequestError)
    refused(lambda: render("{{ messages[0].content + 3 }}"), "chat template", kind=RequestError)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(3) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_run_in_a_sandbox(source: str):
    with pytest.raises(ValueError) as caught:
        out = ChatTemplate(source, path="x.jinja").render(HELLO)
        pytest.fail(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: needs"),
        ("hello", "messages: needs"),
        (None, "messages: needs"),
        ({"role": "user"}, "messages: needs"),
        (["hello"], "messages[0]: needs an object"),
        ([*HELLO, {"content": "x"}], "messages[1].role: None"),
        ([{"role": "model", "content": "x"}], "messages[0].role: 'model'"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "assistant", "content": None}, *HELLO], "messages[0].content"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages[0].weight: unknown key"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x", "tool_calls": {}}, *HELLO], "messages[0].tool_calls"),
        ([*HELLO, {"role": "system", "content": "x"}, *HELLO], "messages[1].role: a system message comes first"),
        ([*HELLO, {"role": "assistant", "content": "x"}], "messages[1].role: the last message"),
        ([{"role": "system", "content": "x"}], "messages[0].role: the last message"),
    ],
)
def test_messages_out_of_order(messages: Any, words: str):
    for call in (check_messages, TEMPLATE.render, lambda messages: TEMPLATE.encode(gemma_like(), messages)):
        refused(lambda call=call: call(messages), words, kind=RequestError)


def test_messages_in_order():
    check_messages(HELLO)
    check_messages([{"role": "system", "content": ""}, *HELLO, CALL, {"role": "tool", "content": "", "name": "f"}])
    check_messages([*HELLO, {"role": "assistant", "content": "x"}], last=False)
