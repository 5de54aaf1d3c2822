"""Chat templates, their errors, and messages that try to be more than messages."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_fixtures import refused
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import ALPHABET, CONTROLS, FAMILIES, byte_level, gemma_like

import dgemma
from dgemma.errors import RequestError
from dgemma.text import ChatTemplate, ReplySplitter, Tokenizer, check_messages

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
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é<'&"}}]


def call(name: str = "f", arguments: Any = '{"x": "y"}', id: Any = "1", **more: Any) -> dict[str, Any]:
    """One entry of `tool_calls`."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calling(*calls: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    """An assistant's message that calls."""
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def answer(content: Any, id: Any = "1", **more: Any) -> dict[str, Any]:
    """A tool's message."""
    return {"role": "tool", "content": content, "tool_call_id": id, **more}


def test_render():
    messages = [{"role": "system", "content": "be"}, *HELLO, {"role": "assistant", "content": "hi"}, *HELLO]
    turns = (
        "<bos><|turn>system\nbe<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n<|turn>user\nhello<turn|>\n"
    )
    assert TEMPLATE.render(messages, think=True) == turns + "<|turn>model\n"
    assert TEMPLATE.render(messages) == turns + "<|turn>model\n<|channel>thought\n<channel|>"
    assert TEMPLATE.render(messages, add_generation_prompt=False) == turns
    listed = '[{"type": "function", "function": {"name": "f", "description": "é<\'&"}}]'
    assert TEMPLATE.render(HELLO, tools=TOOLS).startswith(f"<bos><|turn>system\n{listed}<turn|>")


@pytest.mark.parametrize("family", [gemma_like, byte_level])
def test_encoding_harmless_messages_is_encoding_the_rendered_text(family: Family):
    messages = [*HELLO, calling(call()), answer("日本語 🙂")]
    rendered = TEMPLATE.render(messages, tools=TOOLS)
    assert TEMPLATE.encode(family(), messages, tools=TOOLS) == family().encode(rendered)


texts = st.lists(st.sampled_from([*ALPHABET, *CONTROLS, "<bos>", "\U000f0000", "\U000f0001"])).map("".join)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@given(written=st.tuples(texts, texts, texts, texts, texts))
def test_messages_cannot_write_control_tokens(family: Family, written: tuple[str, ...]):
    """The control tokens of the prompt are those of the same conversation with harmless texts, and nothing is lost."""
    tokenizer = family()

    def conversation(
        user: str, tool: str, key: str, argument: str, description: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        messages = [
            {"role": "user", "content": [{"type": "text", "text": user}]},
            calling(call(arguments=json.dumps({key: argument}))),
            answer(tool),
        ]
        function = {"name": "f", "description": description, "parameters": {"properties": {description: {}}}}
        return messages, [{"type": "function", "function": function}]

    def controls(ids: list[int]) -> list[str]:
        return [str(tokenizer.token_of(i)) for i in ids if tokenizer.token_of(i) in tokenizer.controls]

    messages, tools = conversation(*written)
    harmless, names = conversation(*"aaaaa")
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
        ([{"role": "user", "content": None}], "messages[0].content: needs a text"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]: needs an object with type, text"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content: needs a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: needs a text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "messages[0].content[0].text: needs a text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type: None is not supported"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "w": 1}]}], "messages[0].content[0].w: unknown"),
        ([{"role": "assistant", "content": None}, *HELLO], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": []}, *HELLO], "messages[0].content"),
        ([{"role": "user", "content": "x", "weight": 1}], "messages[0].weight: unknown key"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name: needs a text"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls: only assistant messages"),
        ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages[0].tool_call_id: only tool messages"),
        ([{"role": "user", "content": "x", "reasoning_content": "y"}], "messages[0].reasoning_content: only assistant"),
        ([{"role": "user", "content": "x", "reasoning": "y"}], "messages[0].reasoning: only assistant"),
        ([*HELLO, calling(reasoning_content=[])], "messages[1].reasoning_content: needs a text"),
        ([*HELLO, calling(reasoning=[])], "messages[1].reasoning: needs a text"),
        ([*HELLO, calling(reasoning="a", reasoning_content="b")], "messages[1].reasoning: is the same as reasoning_c"),
        ([{"role": "assistant", "content": "x", "tool_calls": {}}, *HELLO], "messages[0].tool_calls: needs a list"),
        ([*HELLO, {"role": "system", "content": "x"}, *HELLO], "messages[1].role: a system message comes first"),
        ([*HELLO, {"role": "developer", "content": "x"}, *HELLO], "messages[1].role: a system message comes first"),
        ([*HELLO, {"role": "assistant", "content": "x"}], "messages[1].role: the last message"),
        ([{"role": "system", "content": "x"}], "messages[0].role: the last message"),
        ([*HELLO, calling("f")], "messages[1].tool_calls[0]: needs an object"),
        ([*HELLO, calling(call(), call(id=None))], "messages[1].tool_calls[1].id: needs a text"),
        ([*HELLO, calling(call(), call())], "messages[1].tool_calls[1].id: '1' is there twice"),
        ([*HELLO, calling(call(type="custom"))], "messages[1].tool_calls[0].type: 'custom' is not supported"),
        ([*HELLO, calling(call(index=0))], "messages[1].tool_calls[0].index: unknown key"),
        ([*HELLO, calling({"id": "1"})], "messages[1].tool_calls[0].function: needs an object"),
        ([*HELLO, calling(call(name="<turn|>"))], "messages[1].tool_calls[0].function.name: '<turn|>'"),
        ([*HELLO, calling(call(arguments=None))], "messages[1].tool_calls[0].function.arguments: needs a JSON object"),
        ([*HELLO, calling(call(arguments="[1]"))], "messages[1].tool_calls[0].function.arguments: needs a JSON object"),
        ([*HELLO, calling(call(arguments="{x: 1}"))], "messages[1].tool_calls[0].function.arguments: not JSON"),
        ([*HELLO, calling(call(arguments=""))], "messages[1].tool_calls[0].function.arguments: not JSON"),
        ([*HELLO, calling(call(arguments='{"x": NaN}'))], "tool_calls[0].function.arguments: not JSON"),
        ([*HELLO, calling(call(arguments='{"x": 1e999}'))], "tool_calls[0].function.arguments: inf is not"),
        ([*HELLO, calling(call(arguments='{"x": ' + "9" * 5000 + "}"))], "tool_calls[0].function.arguments: not JSON"),
        ([*HELLO, calling(call(arguments='{"x":' * 65 + "1" + "}" * 65))], "function.arguments: nested deeper than 64"),
        ([*HELLO, calling(call(arguments='{"x":' * 10**5))], "tool_calls[0].function.arguments: not JSON"),
        ([*HELLO, calling(call())], "messages[1].role: the last message"),
        ([*HELLO, calling(call()), *HELLO], "messages[1].tool_calls[0]: no tool message answers it (tool_call_id '1')"),
        ([*HELLO, calling(call(), call(id="2")), answer("x")], "messages[1].tool_calls[1]: no tool message answers it"),
        ([*HELLO, calling(call()), answer("x", "2")], "messages[2].tool_call_id: no call before it waits"),
        ([*HELLO, calling(call()), answer("x", None)], "messages[2].tool_call_id: no call before it waits"),
        ([*HELLO, calling(call()), answer("x", ["1"])], "messages[2].tool_call_id: no call before it waits"),
        ([*HELLO, calling(call()), answer("x"), answer("x")], "messages[3].tool_call_id: no call before it waits"),
        ([*HELLO, answer("x")], "messages[1].tool_call_id: no call before it waits"),
        ([*HELLO, calling(call()), answer("x", name="g")], "messages[2].name: 'g' is not the function that was called"),
        ([*HELLO, calling(call()), answer(None)], "messages[2].content: needs a text"),
        ([*HELLO, calling(call()), answer({"x": 1})], "messages[2].content: needs a text"),
    ],
)
def test_messages_out_of_order(messages: Any, words: str):
    for attempt in (check_messages, TEMPLATE.render, lambda messages: TEMPLATE.encode(gemma_like(), messages)):
        refused(lambda attempt=attempt: attempt(messages), words, kind=RequestError)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text(kind: str):
    parts = [{"type": "text", "text": "what is it?"}, {"type": kind, kind: {"url": "data:"}}]
    words = f"messages[0].content[1].type: {kind} is not supported yet"
    assert refused(lambda: check_messages([{"role": "user", "content": parts}]), words, kind=RequestError) == words


def test_messages_in_the_form_that_templates_read():
    assert check_messages(HELLO) == HELLO
    parts = [{"type": "text", "text": "a <b"}, {"type": "text", "text": "> c"}]
    system = {"role": "developer", "content": "", "name": None, "refusal": None}
    calls = calling(call(), call("g", {"deep": [{}]}, "2"), reasoning_content="hm")
    talk = [system, {"role": "user", "content": parts, "name": "Jo"}, calls, answer(parts, "2"), answer("r", name="f")]
    assert check_messages(talk) == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a <b> c", "name": "Jo"},
        {**calls, "content": "", "tool_calls": [call(arguments={"x": "y"}), calls["tool_calls"][1]], "reasoning": "hm"},
        answer("a <b> c", "2", name="g"),
        answer("r", name="f"),
    ]
    for last in (
        [*HELLO, {"role": "assistant", "content": "x", "tool_calls": []}],
        [*HELLO, calling(call())],
        [*HELLO, calling(call(), call(id="2")), answer("r")],
    ):
        assert len(check_messages(last, last=False)) == len(last)
    words = "messages[1].tool_calls[0]: no tool message answers it"
    refused(lambda: check_messages([*HELLO, calling(call()), *HELLO], last=False), words, kind=RequestError)


# A template in the manner of Gemma's: its form of declarations, calls and answers, and turns that go on after them.
GEMMA = """
{%- macro write(value) -%}
    {%- if value is string -%}{{ '<|"|>' + value + '<|"|>' }}
    {%- elif value is boolean -%}{{ value | lower }}
    {%- elif value is mapping -%}{{ '{' }}{{ pairs(value) }}{{ '}' }}
    {%- elif value is iterable -%}
        [{%- for item in value -%}{{ write(item) }}{{ ',' if not loop.last }}{%- endfor -%}]
    {%- else -%}{{ value }}
    {%- endif -%}
{%- endmacro -%}
{%- macro pairs(object) -%}
    {%- for key, value in object | dictsort -%}{{ key }}:{{ write(value) }}{{ ',' if not loop.last }}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set talk = messages[1:] if messages[0].role == 'system' else messages -%}
{%- if tools or enable_thinking or messages[0].role == 'system' -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking %}{{ '<|think|>\n' }}{% endif -%}
    {%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif -%}
    {%- for tool in tools or [] -%}
        {{- '<|tool>declaration:' + tool.function.name + '{' + pairs(tool.function) + '}<tool|>' -}}
    {%- endfor -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- set state = namespace(open=false, before='') -%}
{%- for message in talk if message.role != 'tool' -%}
    {%- set role = 'model' if message.role == 'assistant' else message.role -%}
    {%- if not (role == 'model' and state.before == 'model') %}{{ '<|turn>' + role + '\n' }}{% endif -%}
    {%- set state.before = role -%}
    {%- set state.open = false -%}
    {%- for one in message.tool_calls or [] -%}
        {{- '<|tool_call>call:' + one.function.name + '{' + pairs(one.function.arguments) + '}<tool_call|>' -}}
        {%- set state.open = true -%}
    {%- endfor -%}
    {%- for one in message.tool_calls or [] -%}
        {%- for reply in talk if reply.tool_call_id == one.id -%}
            {{- '<|tool_response>response:' + reply.name + '{value:' + write(reply.content) + '}<tool_response|>' -}}
        {%- endfor -%}
    {%- endfor -%}
    {{- message.content | trim -}}
    {%- if message.content or not state.open %}{{ '<turn|>\n' }}{% set state.open = false %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.open -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif -%}
{%- endif -%}
"""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORECAST = {"type": "function", "function": {"name": "forecast", "description": "Weather", "parameters": SCHEMA}}


def test_a_conversation_with_tools_in_gemmas_form():
    template = ChatTemplate(GEMMA, variables={"bos_token": "<bos>"})
    arguments = {"city": "Paris", "days": 3, "deep": {"a": [1, 2.5, True, None]}}
    calls = calling(call("forecast", json.dumps(arguments)), call("forecast", '{"city": "Rome"}', "2"))
    talk = [{"role": "developer", "content": "Be brief."}, *HELLO, calls, answer("rain", "2"), answer("sun")]
    prompt = (
        '<bos><|turn>system\nBe brief.<|tool>declaration:forecast{description:<|"|>Weather<|"|>,name:<|"|>forecast'
        '<|"|>,parameters:{properties:{city:{type:<|"|>string<|"|>}},required:[<|"|>city<|"|>],type:<|"|>object<|"|>}}'
        "<tool|><turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\n"
        '<|tool_call>call:forecast{city:<|"|>Paris<|"|>,days:3,deep:{a:[1,2.5,true,None]}}<tool_call|>'
        '<|tool_call>call:forecast{city:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:forecast{value:<|"|>sun<|"|>}<tool_response|>'
        '<|tool_response>response:forecast{value:<|"|>rain<|"|>}<tool_response|>'
    )
    assert template.render(talk, tools=[FORECAST]) == prompt
    assert gemma_like().decode(template.encode(gemma_like(), talk, tools=[FORECAST]), keep_special=True) == prompt
    # The same calls come back out of the model's mouth.
    given_out = ReplySplitter().push(prompt)
    assert [(some.name, json.loads(some.arguments)) for some in given_out.calls] == [
        ("forecast", arguments),
        ("forecast", {"city": "Rome"}),
    ]
    after = [*talk, {"role": "assistant", "content": "Sun, rain."}, *HELLO]
    assert template.render(after, tools=[FORECAST], think=True) == (
        prompt.replace("system\n", "system\n<|think|>\n", 1)
        + "Sun, rain.<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\n"
    )


def test_what_a_template_has_no_place_for():
    """The embedded model's template knows no tools: what it would leave out, or spell as "None", is refused."""
    demo = ChatTemplate.read(Path(dgemma.__file__).parent / "demo")
    assert demo is not None
    tokenizer = gemma_like()
    calls = [*HELLO, calling(call()), answer("r")]
    for attempt in (demo.render, functools.partial(demo.encode, tokenizer)):
        message = refused(lambda attempt=attempt: attempt(HELLO, tools=TOOLS), "tools", kind=RequestError)
        assert message == "tools: this model's chat template has no place for them"
        words = "messages[1].tool_calls: this model's chat template has no place for them"
        refused(lambda attempt=attempt: attempt(calls), words, kind=RequestError)
        attempt(HELLO, tools=[])
    deaf = ChatTemplate(SOURCE.replace("in messages -%}", "in messages if message.role != 'tool' -%}"))
    words = "messages[2].content: this model's chat template has no place for a tool's answer"
    refused(lambda: deaf.render(calls), words, kind=RequestError)
    needs_calls = ChatTemplate("{{ messages[1].tool_calls[0].function.name + messages[2].content }}")
    assert needs_calls.render(calls) == "fr"  # it cannot even be rendered without them


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_names_of_speakers(role: str):
    """A name that the template writes is honoured; one that it leaves out is refused by its place."""
    given = {at: {"name": "Jo"} if at == role else {} for at in ("system", "user", "assistant")}
    talk = [
        {"role": "system", "content": "s", **given["system"]},
        {"role": "user", "content": "u", **given["user"]},
        {"role": "assistant", "content": "a", **given["assistant"]},
        *HELLO,
    ]
    place = ["system", "user", "assistant"].index(role)
    words = f"messages[{place}].name: this model's chat template has no place for a name of the {role}"
    demo = ChatTemplate.read(Path(dgemma.__file__).parent / "demo")
    assert demo is not None
    for attempt in (demo.render, TEMPLATE.render, functools.partial(demo.encode, gemma_like())):
        assert refused(lambda attempt=attempt: attempt(talk), words, kind=RequestError) == words
        attempt([{**message, "name": ""} for message in talk])
    knows = ChatTemplate("{% for m in messages %}{{ m.role }} {{ m.name or '?' }}: {{ m.content }}\n{% endfor %}")
    assert f"{role} Jo: {role[0]}\n" in knows.render(talk)
    # A template that knows the users' names alone.
    some = ChatTemplate("{% for m in messages %}{{ m.name if m.role == 'user' }}{{ m.content }}{% endfor %}")
    if role == "user":
        assert "Jou" in some.render(talk)
    else:
        refused(lambda: some.render([*talk, {**HELLO[0], "name": "Al"}]), words, kind=RequestError)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thoughts_are_the_templates_to_show(key: str):
    """Either name reaches a template that knows one of them; one that drops earlier thoughts may."""
    talk = [*HELLO, {"role": "assistant", "content": "a", key: "hm"}, *HELLO]
    for known in ("reasoning", "reasoning_content"):
        template = ChatTemplate(f"{{% for m in messages %}}({{{{ m.{known} }}}}){{{{ m.content }}}}{{% endfor %}}")
        assert template.render(talk) == "()hello(hm)a()hello"
    bare = [*HELLO, {"role": "assistant", "content": "a"}, *HELLO]
    assert TEMPLATE.render(talk) == TEMPLATE.render(bare)


def test_calls_written_by_the_template_itself():
    source = "{% for call in messages[1].tool_calls %}{{ format_call(call.function.name, call.function.arguments) }}"
    template = ChatTemplate(source + "{% endfor %}{{ messages[2].content }}")
    talk = [*HELLO, calling(call(arguments='{"x": "<turn|>"}')), answer("r")]
    assert template.render(talk) == '<|tool_call>call:f{x:<|"|><turn|><|"|>}<tool_call|>r'
    tokens = [gemma_like().token_of(token) for token in template.encode(gemma_like(), talk)]
    assert "<|tool_call>" in tokens and "<turn|>" not in tokens
