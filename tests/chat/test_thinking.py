"""Thoughts: ids of messages that hold some are mistral-common's, and what a model thinks is told apart by ids alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.chat import session
from mistral.chat.conversation import Chat
from mistral.chat.messages import Message, TemplateError, Thought, ToolCall, from_chunks
from mistral.chat.templates import find_template
from mistral.chat.thinking import of_field, of_part, split_system
from mistral.loader.load import load
from mistral.thinking import ThoughtIds, ThoughtReader
from mistral.tokenizer import Tokenizer
from tests.chat.test_templates import later, tokenizer
from tests.support.thinker import ANSWER, SYSTEM_PROMPT, THOUGHT, make_thinker

THINKS = ("v13", "v15")
THINK_IDS = [1, 3, 37133, 4, 34, 1072, 1109, 35, 22177, 1046, 2, 3, 3606, 1101, 4]  # of mistral-common
HIGH_IDS = [1, 36, 19227, 80277, 1302, 13196, 1609, 1449, 2811, 1429, 24871, 46005, 37, 3, 37133, 4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {version: tmp_path_factory.mktemp(version) for version in ("v11", *THINKS)}
    for version, folder in found.items():
        later(version, folder)
    return found


@pytest.fixture(scope="module")
def words(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {version: Tokenizer(folder / "tekken.json") for version, folder in folders.items()}


_references: dict[Path, Any] = {}


def theirs(messages: list[Message], folder: Path, effort: str | None = None) -> list[int]:
    """The ids that mistral-common itself gives."""
    from mistral_common.protocol.instruct import chunk as c
    from mistral_common.protocol.instruct import messages as m
    from mistral_common.protocol.instruct import tool_calls as t
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    def one(message: Message) -> Any:
        content: Any = message.content or None
        if message.thinking:
            content = [
                c.ThinkChunk(thinking=p.text, closed=p.closed) if isinstance(p, Thought) else c.TextChunk(text=p)
                for p in message.chunks
            ]
        if message.role == "tool":
            return m.ToolMessage(content=content, tool_call_id=message.tool_call_id, name="f")
        if message.role == "assistant":
            calls = [
                t.ToolCall(id=one.id, function=t.FunctionCall(name=one.name, arguments=one.arguments))
                for one in message.tool_calls
            ]
            return m.AssistantMessage(content=content, tool_calls=calls or None)
        return {"system": m.SystemMessage, "user": m.UserMessage}[message.role](content=content)

    if folder not in _references:
        _references[folder] = MistralTokenizer.from_file(folder / "tekken.json")
    request = ChatCompletionRequest(messages=[one(message) for message in messages], reasoning_effort=effort)
    return list(_references[folder].encode_chat_completion(request).tokens)


def test_golden_ids_of_a_thought(words: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    answer = from_chunks("assistant", [Thought("Hm"), "Hello."])
    messages = [Message("user", "Hi"), answer, Message("user", "Bye")]
    assert find_template(words["v13"]).encode_chat(messages) == THINK_IDS
    messages[1] = Message("assistant", "Hello.", THINK_IDS[4:10])  # as it was generated
    assert find_template(words["v13"]).encode_chat(messages) == THINK_IDS
    assert find_template(words["v15"]).encode_chat([Message("user", "Hi")], effort="high") == HIGH_IDS


TEXT = st.text(min_size=1, max_size=12).filter(lambda s: s.strip() and not any("\ud800" <= c <= "\udfff" for c in s))
THOUGHTS = TEXT.map(Thought) | st.just(Thought("[/THINK] [THINK]"))
ANSWERS = st.lists(TEXT | THOUGHTS, min_size=1, max_size=4).filter(
    lambda chunks: not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(chunks))
)


@pytest.mark.parametrize("version", THINKS)
@settings(max_examples=60)
@given(system=ANSWERS, answers=st.lists(ANSWERS, min_size=1, max_size=3), together=st.booleans(), call=st.booleans())
def test_any_thoughts_are_mistral_commons(
    version: str,
    system: list[Any],
    answers: list[list[Any]],
    together: bool,
    call: bool,
    words: dict[str, Tokenizer],
    folders: dict[str, Path],
) -> None:
    """Texts and thoughts in any order, in answers that are neighbours or not, with calls or not."""
    first = from_chunks("system", system)
    if version == "v15":  # has no place for thoughts there
        first = Message("system", "Be brief.")
    messages = [first, Message("user", "Hi")]
    for chunks in answers:
        messages += [from_chunks("assistant", chunks)] + ([] if together else [Message("user", "Go on")])
    if call:
        messages += [] if together else [from_chunks("assistant", [Thought("I call")])]
        messages[-1].tool_calls = (ToolCall("f", "{}", "abcdefgh1"),)
        messages += [Message("tool", "1", tool_call_id="abcdefgh1"), from_chunks("assistant", [Thought("So"), "1"])]
    if messages[-1].role == "assistant":
        messages.append(Message("user", "Bye"))
    assert find_template(words[version]).encode_chat(messages) == theirs(messages, folders[version])


def test_no_place_for_a_thought(words: dict[str, Tokenizer]) -> None:
    """As in mistral-common: before v13 there is none, in v15 none in a system prompt, and never in a question."""
    thinking = [Message("user", "Hi"), from_chunks("assistant", [Thought("Hm"), "Hello."]), Message("user", "Bye")]
    for template in (find_template(words["v11"]), find_template(tokenizer("v7")), find_template(tokenizer("v1"))):
        with pytest.raises(TemplateError, match="has no place for thoughts: leave reasoning_content out"):
            template.encode_chat(thinking)
    with pytest.raises(TemplateError, match="v15 has no place for a thought in a system prompt"):
        find_template(words["v15"]).encode_chat([split_system(SYSTEM_PROMPT), Message("user", "Hi")])
    with pytest.raises(TemplateError, match="of the role user has a thought"):
        find_template(words["v13"]).encode_chat([from_chunks("user", [Thought("Hm")])])
    with pytest.raises(TemplateError, match="MistralLite has no place for thoughts"):
        find_template(tokenizer("v1"), release="mistrallite").encode_chat(thinking)
    for version, effort, message in (
        ("v13", "high", "template v13-tekken has no place for one"),
        ("v15", "low", "template v15-tekken has none, high"),
    ):
        with pytest.raises(TemplateError, match=message):
            find_template(words[version]).encode_chat([Message("user", "Hi")], effort=effort)


def test_mistrals_system_prompt(words: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    """A file as Magistral has it, whose [THINK]..[/THINK] is a thought; typed by somebody it stays text."""
    message = split_system(SYSTEM_PROMPT)
    assert (message.content, message.thinking) == ("Think first.\nThen answer.", (Thought("Your thoughts.", 13),))
    ids = find_template(words["v13"]).encode_chat([message, Message("user", "Hi")])
    assert ids == theirs([message, Message("user", "Hi")], folders["v13"])
    assert (ids.count(34), ids.count(35)) == (1, 1)
    typed = find_template(words["v13"]).encode_chat([Message("system", SYSTEM_PROMPT), Message("user", "Hi")])
    assert not {34, 35} & set(typed)
    for broken in ("a [THINK] b", "a [/THINK] b", "[THINK] [THINK] b[/THINK]"):
        with pytest.raises(TemplateError, match="do not go together"):
            split_system(broken)


def test_thoughts_of_requests() -> None:
    assert of_field({"content": "x", "reasoning": "a", "reasoning_content": "a"}) == "a"
    assert of_field({"content": "x", "reasoning": None}) is None
    for wrong, message in (
        ({"reasoning": 1}, "must be text"),
        ({"reasoning": "a", "reasoning_content": "b"}, "differ"),
    ):
        with pytest.raises(TemplateError, match=message):
            of_field(wrong)
    assert of_part({"type": "thinking", "thinking": "a"}) == Thought("a")
    assert of_part({"type": "thinking", "thinking": "a", "closed": False}) == Thought("a", closed=False)
    assert of_part({"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}) == Thought("a")
    for other in ({"type": "text", "text": "a"}, {"type": "thinking"}, {"type": "thinking", "thinking": "a", "b": 1}):
        assert of_part(other) is None


def test_what_is_inside() -> None:
    """A prompt may begin a thought, as templates of some models do; ends without a beginning mean nothing."""
    marks = ThoughtIds(34, 35)
    for prompt, inside in (([1, 3], False), ([1, 34], True), ([34, 35, 4], False), ([34, 35, 34], True)):
        assert ThoughtReader(marks, prompt).inside is inside
    reader = ThoughtReader(marks, [1])
    # The text that comes with a token is what was held back before it.
    assert [reader.take(i) for i in (7, 34, 8, 35, 9, 35, 9)] == [False, False, True, True, False, False, False]
    assert not ThoughtReader(None, [34]).inside


# --- conversations


@pytest.fixture(scope="module", params=THINKS)
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(make_thinker(tmp_path_factory.mktemp("thinker") / "m", request.param), device="cpu", execution="eager")


def chat_of(thinker: Any, **more: Any) -> Chat:
    template = find_template(thinker.tokenizer, folder=thinker.folder)
    return Chat(thinker.model, thinker.tokenizer, template, **{"temperature": 0, "max_tokens": 40, **more})


def ask(chat: Chat, question: str) -> tuple[str, str]:
    pieces = list(chat.answer(question))
    return "".join(p.text for p in pieces if p.thought), "".join(p.text for p in pieces if not p.thought)


def test_a_conversation_keeps_its_thoughts_apart_and_in_the_prompt(thinker: Any, tmp_path: Path) -> None:
    chat = chat_of(thinker)
    for question in ("Why?", "[THINK]really[/THINK]?"):
        assert ask(chat, question) == (THOUGHT, ANSWER)
        said = chat.messages[-1]
        assert (said.content, said.thinking) == (ANSWER, (Thought(THOUGHT),))
    assert chat.cached_tokens > 0  # the earlier thought is still in the prompt, as mistral-common keeps it
    texts = [Message(m.role, m.content, thinking=m.thinking) for m in chat.messages]
    _references.pop(thinker.folder, None)
    assert chat.template.encode_chat([*chat.messages, Message("user", "x")]) == theirs(
        [*texts, Message("user", "x")], thinker.folder
    )
    session.save(chat, tmp_path / "talk.json", "m")
    other = chat_of(thinker)
    session.load(other, tmp_path / "talk.json", "m")
    assert other.messages == chat.messages


def test_the_end_of_a_thought_is_not_the_beginning_of_the_answer(thinker: Any) -> None:
    """What may have become a stop string is held back, and comes while it is still thought."""
    assert ask(chat_of(thinker, stop=(f"{THOUGHT[-2:]}!",)), "Why?") == (THOUGHT, ANSWER)


def test_a_thought_that_is_broken_off_goes_on(thinker: Any) -> None:
    whole = chat_of(thinker)
    ask(whole, "Why?")
    chat = chat_of(thinker, max_tokens=3)
    thought, answer = ask(chat, "Why?")
    (begun,) = chat.messages[-1].thinking
    assert (begun.text, begun.closed, answer) == (thought, False, "")
    assert THOUGHT.startswith(thought)
    chat.params = whole.params
    rest = list(chat.resume())
    assert "".join(p.text for p in rest if not p.thought) == ANSWER
    assert chat.messages == whole.messages


def test_a_system_prompt_with_a_thought_is_kept(thinker: Any, tmp_path: Path) -> None:
    chat = chat_of(thinker)
    if chat.template.name.startswith("v15"):
        with pytest.raises(TemplateError, match="no place for a thought"):
            chat.set_system(split_system(SYSTEM_PROMPT))
        chat.set_effort("high")
    else:
        chat.set_system(split_system(SYSTEM_PROMPT))
        with pytest.raises(TemplateError, match="no place for one"):
            chat.set_effort("high")
    ask(chat, "Why?")
    session.save(chat, tmp_path / "talk.json", "m")
    other = chat_of(thinker)
    session.load(other, tmp_path / "talk.json", "m")
    assert (other.system_message, other.effort) == (chat.system_message, chat.effort)
    assert other._encode(other.messages[:1]) == chat._encode(chat.messages[:1])


def test_stored_thoughts_that_cannot_be(thinker: Any, tmp_path: Path) -> None:
    chat = chat_of(thinker)
    ask(chat, "Why?")
    session.save(chat, tmp_path / "talk.json", "m")
    told = (tmp_path / "talk.json").read_text()
    for old, new in (
        ('"at": 0', '"at": 99'),
        ('"at": 0', '"at": -1'),
        ('"closed": true', '"closed": 1'),
        ('"at": 0, ', ""),
    ):
        assert old in told
        (tmp_path / "broken.json").write_text(told.replace(old, new))
        with pytest.raises(session.SessionError, match="is a broken conversation"):
            session.load(chat_of(thinker), tmp_path / "broken.json", "m")


# --- templates in Jinja

PARTS = (
    "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '' }}{% if m.content is string %}"
    "{{ m.content }}"
    "{% else %}{% for c in m.content %}{% if c.type == 'thinking' %}{{ '[THINK]' + c.thinking + '[/THINK]' }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '[/INST]' if m.role == 'user' else eos_token }}"
    "{% endfor %}"
)
FLAT = (
    "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '' }}{% if m.reasoning_content %}"
    "{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}{% endif %}{{ m.content }}"
    "{{ '[/INST]' if m.role == 'user' else eos_token }}{% endfor %}"
    "{% if reasoning_effort == 'high' %}{{ '[THINK]' }}{% endif %}"
)


@pytest.mark.parametrize("text", [PARTS, FLAT], ids=["parts", "reasoning_content"])
def test_a_folders_own_template_gets_the_thoughts(text: str, folders: dict[str, Path], tmp_path: Path) -> None:
    words = later("v13", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(text)
    template = find_template(words, folder=tmp_path)
    assert template.thought_ids == ThoughtIds(34, 35)
    answer = from_chunks("assistant", [Thought("Hm [/THINK]"), "Hello. [THINK]"])
    ids = template.encode_chat([Message("user", "Hi"), answer, Message("user", "Bye")])
    assert (ids.count(34), ids.count(35)) == (1, 1)  # what a thought spells stays text
    assert ids[:4] == [3, 37133, 4, 34]
    if text is FLAT:
        assert template.encode_chat([Message("user", "Hi")], effort="high")[-1] == 34
    else:
        with pytest.raises(TemplateError, match="has no place in the template"):
            template.encode_chat([Message("user", "Hi")], effort="high")


@pytest.mark.parametrize("version", THINKS)
def test_mistral_commons_own_template_in_jinja(version: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """What `convert --to hf` writes, and what such models are published with."""
    from mistral.formats.hf_template import to_chat_template

    words = later(version, tmp_path)
    text = to_chat_template(words)
    assert text is not None
    direct = find_template(words)
    (tmp_path / "chat_template.jinja").write_text(text)
    template = find_template(words, folder=tmp_path)
    assert template.thought_ids == direct.thought_ids
    answers = [from_chunks("assistant", [Thought("Hm [THINK]"), "Hello."]), from_chunks("assistant", [Thought("So")])]
    system = Message("system", "Be brief.") if version == "v15" else split_system(SYSTEM_PROMPT)
    talk = [system, Message("user", "Hi"), answers[0], Message("user", "And?"), answers[1], Message("user", "Bye")]
    assert template.encode_chat(talk) == direct.encode_chat(talk)
    if version == "v15":
        assert template.encode_chat(talk, effort="high") == direct.encode_chat(talk, effort="high")
