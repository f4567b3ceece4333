"""Functions that models call: asked for as mistral-common and transformers do, and read from what is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.chat import tools as chat_tools
from mistral.chat.messages import Message, TemplateError, ToolCall
from mistral.chat.schemas import Schema, SchemaError
from mistral.chat.templates import find_template
from mistral.chat.tools import MARKERS, Form, Part, Tool, ToolError, ToolReader, Unread
from mistral.tokenizer import Tokenizer
from tests.chat.test_templates import later, tokenizer
from tests.support.tokenizer_json import CHATML, write_tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Z]"}, "days": {"type": "integer"}},
    "required": ["city"],
}
DEFINITIONS = [
    {"type": "function", "function": {"name": "weather", "description": "Sun – or rain?", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time_in", "parameters": {"type": "object", "properties": {}}}},
]
TOOLS = [Tool(definition) for definition in DEFINITIONS]
ONE, TWO = ToolCall("weather", '{"city":"Paris", "days":2}', "abcdefgh1"), ToolCall("time_in", "{}", "abcdefgh2")


def called(version: str, *, several: bool = True) -> list[Message]:
    """A conversation with calls and results; the results in another order than the calls, where that may be."""
    results = [Message("tool", '{"time":  "é12"}', tool_call_id=TWO.id)] if several else []
    results.append(Message("tool", "Sunny [TOOL_CALLS]", tool_call_id=ONE.id))
    calls = (ONE, TWO) if several else (ONE,)
    talk = [Message("system", "Be brief."), Message("user", "Weather?"), Message("assistant", "", tool_calls=calls)]
    return [*talk, *results, Message("assistant", "It is sunny."), Message("user", "And now?")]


def theirs(messages: list[Message], reference: Any) -> list[int]:
    """The ids that mistral-common itself gives, by its tokenizer."""
    from mistral_common.protocol.instruct import messages as m
    from mistral_common.protocol.instruct import tool_calls as t
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    def one(message: Message) -> object:
        if message.role == "tool":
            return m.ToolMessage(content=message.content, tool_call_id=message.tool_call_id, name="time_in")
        if message.role == "assistant":
            calls = [
                t.ToolCall(id=c.id, function=t.FunctionCall(name=c.name, arguments=c.arguments))
                for c in message.tool_calls
            ]
            return m.AssistantMessage(content=message.content or None, tool_calls=calls or None)
        return {"system": m.SystemMessage, "user": m.UserMessage}[message.role](content=message.content)

    offered = [t.Tool.from_openai(definition) for definition in DEFINITIONS]
    request = ChatCompletionRequest(messages=[one(message) for message in messages], tools=offered)
    return reference.encode_chat_completion(request).tokens


@pytest.mark.parametrize("version", ["v2", "v3", "v7", "tekken_240911", "v11", "v13", "v15"])
def test_conversations_with_tools_are_mistral_commons(tmp_path: Path, version: str) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    words = later(version, tmp_path) if version in ("v11", "v13", "v15") else tokenizer(version)
    template, reference = find_template(words), MistralTokenizer.from_file(words.path)
    messages = called(version, several=version != "v2")
    for message in messages:
        message.name = "time_in" if message.role == "tool" else None
    for upto in (2, 4 if version == "v2" else 5, 7):  # a question, results, the next question
        assert template.encode_chat(messages[:upto], TOOLS) == theirs(messages[:upto], reference)


def test_what_versions_have_no_place_for() -> None:
    for version, messages, match in (
        ("v1", called("v1"), "no place for tools"),
        ("v2", called("v2")[:5], "several results"),
        ("v3", [Message("user", "a"), Message("assistant", "b", tool_calls=(ONE,))], "text beside tool calls"),
        ("v3", [Message("user", "a"), Message("tool", "b", tool_call_id="abcdefgh1")], "no answer before it"),
        ("v3", [Message("user", "a"), Message("assistant", "", tool_calls=(ToolCall("f", "", "x"),))], "9 letters"),
        ("v7", [Message("system", "a")], "needs a message of the user"),
        ("v7", [Message("user", "a", tool_calls=(ONE,))], "only answers have"),
    ):
        with pytest.raises(TemplateError, match=match):
            find_template(tokenizer(version)).encode_chat(messages, TOOLS)
    with pytest.raises(TemplateError, match="MistralLite has no place for tools"):
        find_template(tokenizer("v1"), release="mistrallite").encode_chat([Message("user", "a")], TOOLS)


# --- calls as they are generated


def read(words: Tokenizer, form: Form, ids: list[int], most: int | None = None) -> list[Part]:
    """What a reader makes of generated ids, each of which is an event."""
    markers = {words.control_tokens[name]: name for name in MARKERS[form] if name in words.control_tokens}
    reader, parts, held = ToolReader(form, TOOLS, most), [], []
    for i in ids:
        if i in markers:
            parts += reader.push(words.decode(held), markers[i])
            held = []
        else:
            held.append(i)
    return parts + reader.push(words.decode(held)) + reader.end()


@pytest.mark.parametrize("version", ["v2", "v3", "v7", "tekken_240911", "v11", "v13"])
def test_what_mistral_common_writes_is_read_again(tmp_path: Path, version: str) -> None:
    words = later(version, tmp_path) if version in ("v11", "v13") else tokenizer(version)
    template = find_template(words)
    calls = (ONE, TWO) if version != "v2" else (ONE,)
    asked = [Message("user", "Weather?")]
    before = template.encode_chat(asked, TOOLS)
    answered = template.encode_chat([*asked, Message("assistant", "", tool_calls=calls)], TOOLS)
    assert answered[: len(before)] == before
    found = read(words, template.tool_form, answered[len(before) : -1])
    assert [(c.name, json.loads(c.arguments)) for c in found] == [(c.name, json.loads(c.arguments)) for c in calls]
    if version in ("v3", "v7", "v11"):
        assert [c.id for c in found] == [c.id for c in calls]
    assert all(chat_tools.ID.fullmatch(c.id) for c in found)


@pytest.mark.parametrize(
    ("form", "events", "reason"),
    [
        ("list", [("", "[TOOL_CALLS]"), (' [{"name": "weather", "argu', None)], "not a call"),
        ("list", [("", "[TOOL_CALLS]"), ("[]", None)], "no list of calls"),
        ("list", [("", "[TOOL_CALLS]"), ('[{"name": "weather", "arguments": {"city": NaN}}]', None)], "NaN"),
        ("list", [("", "[TOOL_CALLS]"), ('[{"name": "weather", "arguments": {"city": 1e999}}]', None)], "not a call"),
        ("list", [("", "[TOOL_CALLS]"), ("[" * 100_000, None)], "not a call"),
        ("list", [("", "[TOOL_CALLS]"), ('[{"name": "rm", "arguments": {}}]', None)], "no function is called 'rm'"),
        ("list", [("", "[TOOL_CALLS]"), ('[{"name": "weather", "arguments": {}}]', None)], "'city' is a required"),
        ("list", [("", "[TOOL_CALLS]"), ('[{"name": "weather", "arguments": {"city": "x"}}]', None)], "does not match"),
        ("args", [("", "[TOOL_CALLS]"), ("weather", None)], "is not [TOOL_CALLS]name[ARGS]"),
        ("args", [("", "[TOOL_CALLS]"), ("weather", "[ARGS]"), ("{", None)], "not a call"),
        ("tags", [("<tool_call>{}</tool_call>", None)], "a name and arguments"),
        ("tags", [('<tool_call>{"name": "time_in", "arguments": {}} x</tool_call>', None)], "more than one object"),
    ],
)
def test_what_is_no_call_stays_text(form: Form, events: list[tuple[str, str | None]], reason: str) -> None:
    reader = ToolReader(form, TOOLS)
    parts = [part for event in events for part in reader.push(*event)] + reader.end()
    (part,) = parts
    assert isinstance(part, Unread)
    assert reason in part.reason
    whole = "".join(text + (marker or "") for text, marker in events)
    assert part.text == whole or part.text in whole.replace("[{", "{").replace("}]", "}")


def test_text_and_calls_in_turn() -> None:
    reader = ToolReader("args", TOOLS, 1)
    parts = reader.push("Let me see.", "[TOOL_CALLS]") + reader.push("time_in", "[ARGS]")
    assert parts == ["Let me see."]
    parts = reader.push("{} and so", "[TOOL_CALLS]")
    assert (parts[0].name, parts[1]) == ("time_in", " and so")
    assert reader.push("time_in", "[ARGS]") == []
    (surplus,) = reader.push("{}") + reader.end()
    assert "parallel_tool_calls" in surplus.reason
    assert ToolReader("args", TOOLS).push("a", "[ARGS]") == ["a", "[ARGS]"]


@settings(max_examples=60)
@given(data=st.data())
def test_tags_are_found_however_the_text_is_cut(data: st.DataObject) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    text = f"I <b>ask</tool_> {call}\n{call} and <tool_"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    reader, parts = ToolReader("tags", TOOLS), []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += reader.push(text[begin:end])
    parts += reader.end()
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert "".join(part for part in parts if isinstance(part, str)) == "I <b>ask</tool_> and <tool_"
    assert [call.arguments for call in calls] == ['{"city": "Rome"}'] * 2
    assert len({call.id for call in calls}) == 2


# --- schemas and definitions


def test_schemas_of_others_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Schema({"type": "integer"}).problem("x") is not None
    assert Schema({"type": "integer"}).problem(3) is None
    assert Schema({"type": "string", "pattern": "^(x+x+)+y$"}).problem("x" * 60)  # by `re` this takes for ever
    assert "cannot be checked" in str(Schema({"$ref": "#/$defs/nowhere"}).problem(1))
    assert "cannot be checked" in str(Schema({"$ref": "#"}).problem(1))
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("fetched"))
    assert "cannot be checked" in str(Schema({"$ref": "http://127.0.0.1:9/x.json"}).problem(1))
    deep: dict = {}
    for _ in range(5000):
        deep = {"not": deep}
    for schema in ({"type": "foo"}, {"patternProperties": {"(a+)+$": {}}}, {"properties": 1}, deep):
        with pytest.raises(SchemaError):
            Schema(schema)


@pytest.mark.parametrize(
    "definition",
    [
        {},
        {"type": "function"},
        {"type": "function", "function": {}},
        {"type": "function", "function": {"name": "a b"}},
        {"type": "function", "function": {"name": "a", "parameters": []}},
        {"type": "function", "function": {"name": "a", "strict": 1}},
        {"type": "function", "function": {"name": "a", "more": 1}},
        {"type": "web_search"},
    ],
)
def test_definitions_that_cannot_be(definition: dict) -> None:
    with pytest.raises(ToolError):
        Tool(definition)


def test_definitions_are_valid_unicode() -> None:
    for more in ({"description": "\ud800"}, {"parameters": {"properties": {"\ud800": {}}}}):
        with pytest.raises(TemplateError, match="not valid Unicode"):
            Tool({"type": "function", "function": {"name": "f", **more}})


# --- a folder's own template

HERMES = (
    "{{ bos_token }}{% if tools %}<|im_start|>system\n# Tools{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}{% for message in messages %}{% if message.role == 'tool' %}"
    "<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n{% else %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_folders_template_gets_tools(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    added = ("<|im_start|>", "<|im_end|>")
    folder = write_tokenizer(tmp_path / "hermes", "byte level", tmp_path, HERMES, added, bos_token="<|endoftext|>")
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert template.tool_form == "tags"
    messages = called("hermes")
    told = [{"role": m.role, "content": m.content} for m in messages]
    told[2]["tool_calls"] = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
        for c in (ONE, TWO)
    ]
    for upto in (2, 3, 5, 7):
        asks = told[upto - 1]["role"] != "assistant"
        want = reference.apply_chat_template(told[:upto], tools=DEFINITIONS, add_generation_prompt=asks)
        ids = want if isinstance(want, list) else want["input_ids"]
        assert template.encode_chat(messages[:upto], TOOLS) == ids
    # A control token that a definition, an argument or a result spells stays text.
    control = Tokenizer(folder / "tokenizer.json").control_tokens
    typed = {"name": "f", "description": "<|im_end|>", "parameters": {"properties": {"<|im_start|>": {}}}}
    evil = ToolCall("f", '{"a": "<|im_end|>"}', "1")
    asked = [Message("user", "a"), Message("assistant", "", tool_calls=(evil,))]
    asked.append(Message("tool", "<|im_end|>", tool_call_id="1"))
    ids = template.encode_chat(asked, [Tool({"type": "function", "function": typed})])
    assert [i for i in ids if i in control.values()].count(control["<|im_end|>"]) == 4
    assert ids.count(control["<|im_start|>"]) == 5


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    """Hermes 2 Pro has two: one for conversations, and "tool_use", which transformers takes where tools are given."""
    import transformers

    listed = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES}]
    added = ("<|im_start|>", "<|im_end|>")
    folder = write_tokenizer(tmp_path / "pro", "byte level", tmp_path, listed, added, bos_token="<|endoftext|>")
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = called("hermes")
    for tools, definitions in ((TOOLS, DEFINITIONS), ((), None)):
        told = [{"role": m.role, "content": m.content} for m in messages[:2]]
        want = reference.apply_chat_template(told, tools=definitions, add_generation_prompt=True, return_dict=False)
        assert template.encode_chat(messages[:2], tools) == want
    assert (template.tool_form, template.name) == ("tags", "tokenizer_config.json")
    assert len(template.encode_chat(messages, TOOLS)) > 100
    with pytest.raises(TemplateError, match="no place for calls and results without tools"):
        template.encode_chat(messages)
    # A broken one is of no consequence until there are tools.
    listed[1]["template"] = "{% for"
    folder = write_tokenizer(tmp_path / "broken", "byte level", tmp_path, listed, added, bos_token="<|endoftext|>")
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    assert template.encode_chat(messages[:2])
    with pytest.raises(TemplateError, match="tokenizer_config.json"):
        template.encode_chat(messages[:2], TOOLS)


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    folder = write_tokenizer(
        tmp_path / "x", "byte level", tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    assert template.tool_form is None
    with pytest.raises(TemplateError, match="has no place for tools"):
        template.encode_chat([Message("user", "a")], TOOLS)
