"""Which ids of a conversation are answers: the whole is what a chat has, and what counts is what was answered."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mistral.chat.messages import Message, TemplateError, Thought, ToolCall, from_chunks
from mistral.chat.templates import MistralCommon, Template, find_template
from mistral.chat.tools import ID, Tool
from mistral.tokenizer import Tokenizer
from mistral.train.conversations import Marked, Turn, mark_text, mark_turns
from mistral.train.data import DataError, read_samples
from tests.chat.test_templates import DATA, FILES, later, tokenizer
from tests.chat.test_tools import HERMES
from tests.support.tokenizer_json import CHATML, KINDS, ZEPHYR, write_tokenizer

ANSWERS = ("Hello there.", "one\n\ntwo  spaces and 永和", "[/INST] </s> <|im_end|>")
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Hi"),
    Turn("assistant", ANSWERS[0], 1.0),
    Turn("user", "And?"),
    Turn("assistant", ANSWERS[1], 0.5),
    Turn("user", "A"),
    Turn("user", "B"),
    Turn("assistant", ANSWERS[2], 1.0),
)
TOOLS = [{"type": "function", "function": {"name": "rain", "description": "?", "parameters": {"type": "object"}}}]
CALLS = (
    Turn("user", "Rain?"),
    Turn("assistant", "", 1.0, (("abcdefghi", "rain", '{"city": "Oslo"}'),)),
    Turn("tool", "[true]", tool_call_id="abcdefghi", name="rain"),
    Turn("assistant", "It rains.", 1.0),
)


def spans(ids: Sequence[int], weights: Sequence[float]) -> list[tuple[float, list[int]]]:
    """Neighbouring ids that count alike."""
    found: list[tuple[float, list[int]]] = []
    for i, weight in zip(ids, weights, strict=True):
        if not found or found[-1][0] != weight:
            found.append((weight, []))
        found[-1][1].append(i)
    return [(weight, run) for weight, run in found if weight]


def check(template: Template, own: Tokenizer, ends: frozenset[int]) -> None:
    marked = mark_turns(template, TURNS, (), own.eos_ids)
    whole = template.encode_chat([Message(turn.role, turn.content) for turn in TURNS])
    assert marked.ids == whole
    learned = spans(marked.ids, marked.weights)
    assert [weight for weight, _ in learned] == [1.0, 0.5, 1.0]
    for (_, ids), answer in zip(learned, ANSWERS, strict=True):
        assert ids[-1] in ends
        assert not ends & set(ids[:-1])  # what looks like an end in an answer is text
        assert own.decode(ids[:-1]).strip() == answer


@pytest.mark.parametrize("version", FILES)
def test_mistrals_templates(version: str) -> None:
    own = tokenizer(version)
    check(find_template(own), own, frozenset({own.eos_id}))


@pytest.mark.parametrize("version", ["v11", "v15"])
def test_later_templates(version: str, tmp_path: Path) -> None:
    own = later(version, tmp_path)
    check(find_template(own), own, frozenset({own.eos_id}))


@pytest.mark.parametrize("text", [CHATML, ZEPHYR], ids=["chatml", "zephyr"])
def test_templates_of_folders(text: str, tmp_path: Path) -> None:
    kind = KINDS[2]
    folder = tmp_path / "folder"
    write_tokenizer(
        folder, kind, tmp_path, text, ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>")
    )
    own = Tokenizer(folder / "tokenizer.json")
    template = find_template(own, folder=folder)
    one = [turn for turn in TURNS if turn.role != "system"][:4]
    marked = mark_turns(template, one, (), own.eos_ids)
    assert marked.ids == template.encode_chat([Message(turn.role, turn.content) for turn in one])
    learned = spans(marked.ids, marked.weights)
    assert [weight for weight, _ in learned] == [1.0, 0.5]
    for (_, ids), answer in zip(learned, ANSWERS, strict=False):
        assert ids[-1] in template.ends | own.eos_ids
        assert own.decode(ids[:-1]).strip() == answer


def test_messages_of_a_sample_are_given_as_they_are(tmp_path: Path) -> None:
    """As in a chat: an empty system prompt is one, and neighbours are turns of their own. Two answers are refused."""
    template, own = hermes(tmp_path, CHATML)
    turns = [Turn("system", ""), Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c", 1.0)]
    marked = mark_turns(template, turns, (), own.eos_ids)
    assert marked.ids == template.encode_chat([turn.message for turn in turns])
    assert marked.ids.count(own.control_tokens["<|im_start|>"]) == 4
    with pytest.raises(TemplateError, match="two answers follow each other"):
        mark_turns(template, [*turns, Turn("assistant", "d", 1.0)], (), own.eos_ids)


def test_mistrallite() -> None:
    own = tokenizer("v1")
    template = find_template(own, name="mistrallite")
    marked = mark_turns(template, TURNS[1:5], (), own.eos_ids)
    assert [own.decode(ids[:-1]) for _, ids in spans(marked.ids, marked.weights)] == list(ANSWERS[:2])


@pytest.mark.parametrize("version", ["v3", "tekken_240911"])
def test_calls_of_tools_are_mistral_commons(version: str) -> None:
    """Against mistral-common's own encoding of the same request; the call and the answer count."""
    from mistral_common.protocol.instruct import tool_calls as theirs
    from mistral_common.protocol.instruct.messages import AssistantMessage, ToolMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest

    own = tokenizer(version)
    template = find_template(own)
    assert isinstance(template, MistralCommon)
    call = theirs.ToolCall(id="abcdefghi", function=theirs.FunctionCall(name="rain", arguments='{"city": "Oslo"}'))
    messages = [
        UserMessage(content="Rain?"),
        AssistantMessage(tool_calls=[call]),
        ToolMessage(content="[true]", tool_call_id="abcdefghi", name="rain"),
        AssistantMessage(content="It rains."),
    ]
    request = InstructRequest(messages=messages, available_tools=[theirs.Tool.model_validate(TOOLS[0])])
    want = template.parts[0].encode_instruct(request).tokens
    marked = mark_turns(template, CALLS, TOOLS, own.eos_ids)
    assert marked.ids == want
    (_, called), (_, said) = spans(marked.ids, marked.weights)
    assert called[0] == own.control_tokens["[TOOL_CALLS]"]
    assert '"name": "rain"' in own.decode(called)
    assert (called[-1], said[-1]) == (own.eos_id, own.eos_id)
    assert own.decode(said[:-1]).strip() == "It rains."


def of_calls(*ids: str, content: str = "", name: str | None = "rain") -> list[Turn]:
    """A question, an answer with a call for each id, their results from the last to the first, and an answer."""
    calls = tuple((id, "rain", f'{{"n":{i}}}') for i, id in enumerate(ids))
    results = [Turn("tool", f"[{i}]", tool_call_id=ids[i], name=name) for i in reversed(range(len(ids)))]
    said = [Turn("assistant", content, 1.0, calls), *results, Turn("assistant", "It rains.", 1.0)]
    return [Turn("user", "Rain?"), *said]


@pytest.mark.parametrize("version", ["v2", "v3", "v7", "tekken_240911", "v11", "v13", "v15"])
def test_calls_have_the_ids_of_a_chat(version: str, tmp_path: Path) -> None:
    """Results in another order than their calls, JSON without spaces, a result without a name."""
    own = tokenizer(version) if version in FILES else later(version, tmp_path)
    template = find_template(own)
    ids = ("abcdefghi",) if version == "v2" else ("abcdefghi", "zbcdefghi")
    for turns in (of_calls(*ids), of_calls(*ids, name=None)):
        marked = mark_turns(template, turns, TOOLS, own.eos_ids)
        assert marked.ids == template.encode_chat([turn.message for turn in turns], [Tool(TOOLS[0])])
        assert [weight for weight, _ in spans(marked.ids, marked.weights)] == [1.0, 1.0]
        assert not marked.renamed


def test_ids_of_calls_that_a_template_cannot_write_become_others() -> None:
    """OpenAI's, in a call and in its result."""
    own = tokenizer("v3")
    template = find_template(own)
    marked = mark_turns(template, of_calls("call_7", "abcdefghi"), TOOLS, own.eos_ids)
    text = own.decode(marked.ids)
    (new,) = set(re.findall(r'"id": "(\w+)"', text)) - {"abcdefghi"}
    assert ID.fullmatch(new)
    assert f'"call_id": "{new}"' in text
    assert marked.renamed == 1
    again = mark_turns(template, of_calls(new, "abcdefghi"), TOOLS, own.eos_ids)
    assert (again.renamed, again.ids) == (0, marked.ids)


@pytest.mark.parametrize(
    ("version", "turns", "tools", "said"),
    [
        ("v1", of_calls("abcdefghi"), [], "v1 has no place for tools"),
        ("v1", TURNS, TOOLS, "v1 has no place for tools"),
        ("v3", of_calls("abcdefghi", content="Let me see."), TOOLS, "no place for text beside tool calls"),
        ("v3", of_calls("null"), TOOLS, "the id of a tool call is 'null'"),
        ("v2", of_calls("a", "b"), TOOLS, "no place for several results"),
        ("v3", CALLS, [{"type": "function", "function": {"parameters": {}}}], "tools: a function.s name is None"),
    ],
)
def test_what_a_template_cannot_write_is_a_mistake_of_the_line(
    version: str, turns: Sequence[Turn], tools: list[dict[str, Any]], said: str
) -> None:
    own = tokenizer(version)
    with pytest.raises(TemplateError, match=said):
        mark_turns(find_template(own), turns, tools, own.eos_ids)


@pytest.mark.parametrize("kind", [*FILES, "json"])
def test_a_completion_is_learned_as_it_is_written(kind: str, tmp_path: Path) -> None:
    """In the middle of a word, behind a space that ends the prompt, before a line break; a prompt keeps its own ids."""
    own = (
        tokenizer(kind)
        if kind in FILES
        else Tokenizer(write_tokenizer(tmp_path, KINDS[0], tmp_path, "") / "tokenizer.json")
    )
    for prompt, text in (
        ("The king", "dom"),
        ("A: ", "yes"),
        ("A:", " yes"),
        ("a  ", "  b"),
        ("A: ", "\nyes"),
        ("", "a"),
    ):
        marked = mark_text(own, prompt, text)
        assert own.decode(marked.ids) == own.decode(own.encode(prompt + text))
        before = own.encode(prompt) if prompt else marked.ids[:1]
        assert marked.ids[: len(before)] == before
        assert marked.weights == [0.0] * len(before) + [1.0] * (len(marked.ids) - len(before))


def hermes(tmp_path: Path, text: str = HERMES) -> tuple[Template, Tokenizer]:
    added = ("<|im_start|>", "<|im_end|>")
    folder = write_tokenizer(tmp_path / "folder", KINDS[2], tmp_path, text, added, bos_token="<|endoftext|>")
    own = Tokenizer(folder / "tokenizer.json")
    return find_template(own, folder=folder), own


def test_calls_of_tools_by_a_folders_template(tmp_path: Path) -> None:
    """The ids are those that a chat has; the call and the answer count, each with its end."""
    template, own = hermes(tmp_path)
    marked = mark_turns(template, CALLS, TOOLS, own.eos_ids)
    call = ToolCall("rain", '{"city": "Oslo"}', "abcdefghi")
    said = [
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "[true]", tool_call_id="abcdefghi", name="rain"),
        Message("assistant", "It rains."),
    ]
    assert marked.ids == template.encode_chat(said, [Tool(TOOLS[0])])
    (_, called), (_, answered) = spans(marked.ids, marked.weights)
    text = '<tool_call>\n{"name": "rain", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert own.decode(called[:-1]).strip() == text
    assert own.decode(answered[:-1]).strip() == "It rains."
    assert called[-1] == answered[-1] == own.control_tokens["<|im_end|>"]


def test_tools_with_the_last_question(tmp_path: Path) -> None:
    """A template that writes earlier turns again, as Mistral's do: answers behind the last question can be learned."""
    text = (
        "{% set at = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set at.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for message in messages %}"
        "{% if tools and loop.index0 == at.last %}{{ tools | tojson }}{% endif %}"
        "<|im_start|>{{ message.role }}\n{{ message.content }}{{ '<tool_call>' if message.tool_calls }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template, own = hermes(tmp_path, text)
    turns = [Turn("user", "Hi"), Turn("assistant", "Yes?", 0.0), *CALLS[:1], Turn("assistant", "No.", 1.0)]
    marked = mark_turns(template, turns, TOOLS, own.eos_ids)
    ((_, answered),) = spans(marked.ids, marked.weights)
    assert own.decode(answered[:-1]).strip() == "No."
    with pytest.raises(TemplateError, match="writes earlier turns again"):
        mark_turns(template, [turns[0], Turn("assistant", "Yes?", 1.0), *turns[2:]], TOOLS, own.eos_ids)


def test_tools_without_a_place_are_refused(tmp_path: Path) -> None:
    own = tokenizer("v1")
    with pytest.raises(TemplateError, match="no place for tools"):
        mark_turns(find_template(own, name="mistrallite"), CALLS, TOOLS, own.eos_ids)
    template, own = hermes(tmp_path, CHATML)
    with pytest.raises(TemplateError, match="no place for tools"):
        mark_turns(template, CALLS, (), own.eos_ids)
    template, own = hermes(tmp_path)
    with pytest.raises(TemplateError, match="tools: a tool must be"):
        mark_turns(template, CALLS, [{"type": "function"}], own.eos_ids)


def test_a_template_that_writes_earlier_turns_again_is_refused(tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %} (earlier){% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = tmp_path / "folder"
    write_tokenizer(folder, KINDS[2], tmp_path, text, ())
    own = Tokenizer(folder / "tokenizer.json")
    for turns, instead in ((TURNS[1:5], "a line for each answer$"), (TURNS[1:3], "the line as prompt and completion$")):
        with pytest.raises(TemplateError, match=f"writes earlier turns again.* or give {instead}"):
            mark_turns(find_template(own, folder=folder), turns, (), own.eos_ids)


def test_data_files_are_there() -> None:
    assert all((DATA / name).is_file() for name in FILES.values())


@pytest.mark.parametrize("version", ["v13", "v15"])
def test_thoughts_are_learned_with_their_answers(version: str, tmp_path: Path) -> None:
    """Read from lines of a file in each form, and written as a chat writes them."""
    words = later(version, tmp_path)
    template = find_template(words, folder=tmp_path)
    forms: list[dict[str, Any]] = [
        {"content": "Hello.", "reasoning_content": "Hm"},
        {"content": "Hello.", "reasoning": "Hm"},
        {"content": [{"type": "thinking", "thinking": "Hm"}, {"type": "text", "text": "Hello."}]},
    ]
    mark = partial(mark_turns, template, eos=words.eos_ids)
    want = template.encode_chat([Message("user", "Hi"), from_chunks("assistant", [Thought("Hm"), "Hello."])])
    for form in forms:
        file = tmp_path / "train.jsonl"
        line = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", **form}]}
        file.write_text(json.dumps(line))
        (sample,) = read_samples(file, partial(mark_text, words), mark, 99).samples
        assert list(sample.ids) == want
        ((weight, learned),) = spans(sample.ids, sample.weights)
        think = words.control_tokens["[THINK]"]
        assert (weight, learned[0], learned[-1]) == (1.0, think, words.eos_id)


def test_thoughts_without_a_place(tmp_path: Path) -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello.", 1.0, thinking=(Thought("Hm"),))]
    with pytest.raises(TemplateError, match="no place for thoughts"):
        mark_turns(find_template(tokenizer("v7")), turns, (), frozenset({2}))
    file = tmp_path / "train.jsonl"
    for message, said in (
        ({"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}, "has a thought, but is no answer"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "images and sound cannot be learned"),
    ):
        answer = {"role": "assistant", "content": "b"}
        file.write_text(json.dumps({"messages": [message, answer]}))
        with pytest.raises(DataError, match=said):
            read_samples(file, partial(mark_text, tokenizer("v7")), lambda *_: Marked(), 99)
