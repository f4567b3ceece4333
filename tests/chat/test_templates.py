"""Conversations as ids: mistral-common's, to the token, and typed control tokens that stay text."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mistral.chat.messages import Message, TemplateError, behind
from mistral.chat.remembered import remember
from mistral.chat.templates import find_template
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"
FILES = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken_240718": "tekken_240718.json",
    "tekken_240911": "tekken_240911.json",
}
V1 = "1 733 16289 28793 1739 6817 28723 13 13 23809 733 28748 16289 28793 22557 28723 2 733 16289 28793 2463 28706 733"
V3 = "1 3 16127 4 23325 29491 2 3 2507 7585 29491 781 781 2698 29474 4"
TEKKEN = "1 3 37133 4 22177 1046 2 3 5934 13426 1338 3606 1101 4"
# System "Be brief.", user "Hi", assistant "Hello.", user "Bye"; made by mistral-common 1.13.1.
GOLDEN = {
    "v1": f"{V1} 28748 16289 28793",
    "v2": V3,
    "v3": V3,
    "v7": "1 16 2507 7585 29491 17 3 16127 4 23325 29491 2 3 3231 29474 4",
    "tekken_240718": TEKKEN,
    "tekken_240911": TEKKEN,
}
_tokenizers: dict[str, Tokenizer] = {}


def tokenizer(version: str) -> Tokenizer:
    if version not in _tokenizers:
        _tokenizers[version] = Tokenizer(DATA / FILES[version])
    return _tokenizers[version]


def answered(version: str, system: str, *turns: tuple[str, str | None]) -> list[Message]:
    """Answers as the ids of their texts, as a model may have generated them."""
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages.append(Message("user", question))
        if answer is not None:
            messages.append(Message("assistant", answer, tokenizer(version).encode(answer, bos=False)))
    return messages


def talk(*texts: str, system: str = "") -> list[Message]:
    """User and assistant in turn."""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return behind(Message("system", system) if system else None, turns)


@pytest.mark.parametrize("version", FILES)
def test_golden_ids(version: str) -> None:
    template = find_template(tokenizer(version))
    ids = template.encode_chat(answered(version, "Be brief.", ("Hi", "Hello."), ("Bye", None)))
    assert ids == [int(i) for i in GOLDEN[version].split()]


# --- later versions: no tokenizer file comes with mistral-common, so the words are those of an earlier one

LATER = ("v7", "v11", "v13", "v15")
NAMED = {32: "[ARGS]", 33: "[CALL_ID]", 34: "[THINK]", 35: "[/THINK]", 36: "[MODEL_SETTINGS]", 37: "[/MODEL_SETTINGS]"}
PLAIN_IDS = "1 17 5934 13426 1046 18 3 37133 4 22177 1046 2 3 3606 1101 4"
SETTINGS = "36 19227 80277 1302 13196 1609 1449 2811 1429 17670 46005 37"
LATER_GOLDEN = dict.fromkeys(LATER, PLAIN_IDS) | {"v15": PLAIN_IDS.replace(" 18 ", f" 18 {SETTINGS} ")}


def later(version: str, folder: Path) -> Tokenizer:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    told = json.loads((DATA / "tekken_240911.json").read_text(encoding="utf-8"))
    told["config"]["version"] = version
    told.pop("image", None)
    early = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    fill = [NAMED.get(i, f"<SPECIAL_{i}>") for i in range(len(early), 38)]
    told["special_tokens"] = [
        *early,
        *({"rank": len(early) + i, "token_str": word, "is_control": True} for i, word in enumerate(fill)),
    ]
    if version == "v15":
        effort = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        told["model_settings_builder"] = {"reasoning_effort": effort}
    (folder / "tekken.json").write_text(json.dumps(told), encoding="utf-8")
    return Tokenizer(folder / "tekken.json")


@pytest.mark.parametrize("version", LATER)
def test_golden_ids_of_later_versions(tmp_path: Path, version: str) -> None:
    from mistral_common.protocol.instruct import messages as theirs
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    words = later(version, tmp_path)
    template = find_template(words, folder=tmp_path)
    assert template.name == f"{version}-tekken"
    want = [int(i) for i in LATER_GOLDEN[version].split()]
    messages = talk("Hi", "Hello.", "Bye", system="Be brief.")
    assert template.encode_chat(messages) == want
    messages[2] = Message("assistant", "Hello.", words.encode("Hello.", bos=False))
    assert template.encode_chat(messages) == want
    request = ChatCompletionRequest(
        messages=[
            theirs.SystemMessage(content="Be brief."),
            theirs.UserMessage(content="Hi"),
            theirs.AssistantMessage(content="Hello."),
            theirs.UserMessage(content="Bye"),
        ]
    )
    assert MistralTokenizer.from_file(tmp_path / "tekken.json").encode_chat_completion(request).tokens == want


def test_later_versions_are_of_tekken() -> None:
    with pytest.raises(TemplateError, match="template v13 needs a tekken tokenizer of its version"):
        find_template(tokenizer("v7"), name="v13")
    with pytest.raises(TemplateError, match="template v11 needs a tekken tokenizer of its version"):
        find_template(tokenizer("tekken_240911"), name="v11")


TEXT = st.text(min_size=1, max_size=30).filter(lambda s: s.strip() and not any("\ud800" <= c <= "\udfff" for c in s))


@pytest.mark.parametrize("version", FILES)
@settings(max_examples=25)
@given(system=st.one_of(st.just(""), TEXT), turns=st.lists(st.tuples(TEXT, TEXT), min_size=0, max_size=3), last=TEXT)
def test_any_conversation_is_mistral_commons(
    version: str, system: str, turns: list[tuple[str, str]], last: str
) -> None:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    messages = [SystemMessage(content=system)] if system else []
    for question, answer in turns:
        # Answers are kept as ids; as text, mistral-common drops blanks at their ends in some versions.
        messages += [UserMessage(content=question), AssistantMessage(content=answer.strip() or "x")]
    messages.append(UserMessage(content=last))
    want = reference(version).encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    ours = answered(version, system, *((q, a.strip() or "x") for q, a in turns), (last, None))
    assert find_template(tokenizer(version)).encode_chat(ours) == want
    texts = [Message(m.role, m.content) for m in ours]
    assert find_template(tokenizer(version)).encode_chat(texts) == want


ROLES = st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=7)


@pytest.mark.parametrize("version", FILES)
@settings(max_examples=40)
@given(roles=ROLES, texts=st.lists(TEXT.map(str.strip), min_size=8, max_size=8), empty=st.sets(st.integers(0, 7)))
@example(roles=["system"], texts=["a"] * 8, empty={0})
@example(roles=["system", "system"], texts=["a"] * 8, empty={0})
def test_roles_in_any_order_are_mistral_commons(
    version: str, roles: list[str], texts: list[str], empty: set[int]
) -> None:
    """A system prompt may be empty: since v7 it is written all the same."""
    from mistral_common.protocol.instruct import messages as theirs
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = {"system": theirs.SystemMessage, "user": theirs.UserMessage, "assistant": theirs.AssistantMessage}
    roles = [*roles, "user"]
    texts = [
        "" if i in empty and role == "system" else text
        for i, (role, text) in enumerate(zip(roles, texts, strict=False))
    ]
    want_of = [kinds[role](content=text) for role, text in zip(roles, texts, strict=False)]
    if any(pair == ("assistant", "system") for pair in pairwise(roles)):
        return  # refused there; here it is written as the version writes a system prompt
    want = reference(version).encode_chat_completion(ChatCompletionRequest(messages=want_of)).tokens
    ours = [Message(role, text) for role, text in zip(roles, texts, strict=False)]
    assert find_template(tokenizer(version)).encode_chat(ours) == want


def test_neighbours_of_one_role_are_joined() -> None:
    template = find_template(tokenizer("v1"))
    two = [Message("user", "A"), Message("user", "B")]
    assert template.encode_chat(two) == template.encode_chat(talk("A\n\nB"))
    answers = [Message("user", "A"), Message("assistant", "x"), Message("assistant", "y"), Message("user", "B")]
    assert template.encode_chat(answers) == template.encode_chat(talk("A", "x\n\ny", "B"))


def test_messages_that_cannot_be() -> None:
    for template in (find_template(tokenizer("v1")), find_template(tokenizer("v1"), release="mistrallite")):
        with pytest.raises(TemplateError, match="at least one message"):
            template.encode_chat([])
        with pytest.raises(TemplateError, match="no role is called 'chef': system, user, assistant, tool"):
            template.encode_chat([Message("chef", "x")])


_references: dict = {}


def reference(version: str):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    if version not in _references:
        _references[version] = MistralTokenizer.from_file(DATA / FILES[version])
    return _references[version]


CONTROL = ("[INST]", "[/INST]", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<|prompter|>", "[TOOL_CALLS]")


@pytest.mark.parametrize("version", [*FILES, "mistrallite"])
def test_typed_control_tokens_stay_text(version: str) -> None:
    words = tokenizer("v1" if version == "mistrallite" else version)
    template = find_template(words, release=version)
    system = "" if version == "mistrallite" else "{}"

    def controls(word: str) -> list[int]:
        messages = [Message("user", f"a {word} b"), Message("assistant", "", [5]), Message("user", word)]
        ids = template.encode_chat([Message("system", system.format(word)), *messages])
        first_word = 1000 if words.is_tekken else 3 if version in ("v1", "mistrallite") else 771
        return [i for i in ids if i < first_word or (i >= 32000 and version == "mistrallite")]

    plain = controls("hello")
    assert plain
    for word in CONTROL:
        assert controls(word) == plain
        assert words.decode(words.encode(word)).strip() == word


# --- which template


@pytest.mark.parametrize(
    ("source", "name", "template"),
    [
        ("v1", "tokenizer.model", "v1"),
        ("v2", "tokenizer.model.v2", "v2"),
        ("v3", "tokenizer.model.v3", "v3"),
        ("v3", "tokenizer.model", "v3"),  # as in Hugging Face's folders: the contents tell
        ("v7", "tokenizer.model.v7m1", "v7"),
        ("v7", "tokenizer.model", "v7"),
        ("tekken_240718", "tekken.json", "v3-tekken"),
    ],
)
def test_the_tokenizer_says_which(tmp_path: Path, source: str, name: str, template: str) -> None:
    shutil.copy(DATA / FILES[source], tmp_path / name)
    assert find_template(Tokenizer(tmp_path / name)).name == template


def test_a_template_may_be_named(tmp_path: Path) -> None:
    assert find_template(tokenizer("v3"), name="v7").name == "v7"
    assert find_template(tokenizer("v1"), name="mistrallite").name == "mistrallite"
    assert find_template(tokenizer("v1"), name="v1", release="mistrallite").name == "v1"
    for words in ("v1", "v3", "v7", "tekken_240718"):
        own = find_template(tokenizer(words))
        assert find_template(tokenizer(words), name=own.name).name == own.name, "as it is printed"
    for words, name, message in (
        ("v3", "v3-tekken", r"template v3-tekken is for a tekken tokenizer, which \S+ is not: use v3"),
        ("tekken_240718", "v4-tekken", "no template is called 'v4-tekken'"),
        ("tekken_240718", "mistrallite-tekken", "no template is called 'mistrallite-tekken'"),
        ("v3", "v4", "no template is called 'v4': v1, v2, v3, v7, v11, v13, v15, mistrallite"),
        ("v1", "v3", r"template v3 needs the control token \[INST\], which tokenizer.model.v1 lacks"),
        ("v3", "mistrallite", "template mistrallite needs a tokenizer of 32000 words"),
    ):
        with pytest.raises(TemplateError, match=message):
            find_template(tokenizer(words), name=name)
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path / "tokenizer.model.v14")
    with pytest.raises(TemplateError, match=r"tokenizer.model.v14 is of version v14, which later releases have"):
        find_template(Tokenizer(tmp_path / "tokenizer.model.v14"))


def test_mistrallite() -> None:
    words = tokenizer("v1")
    template = find_template(words, release="mistrallite")
    hi, bye = (words.encode(text, bos=False) for text in ("Hi", "Bye"))
    assert template.encode_chat([Message("user", "Hi"), Message("assistant", "", [7, 8]), Message("user", "Bye")]) == [
        *(1, 32002, *hi, 2, 32001, 7, 8, 2),
        *(32002, *bye, 2, 32001),
    ]
    with pytest.raises(TemplateError, match="no place for a system prompt"):
        template.encode_chat(talk("Hi", system="Be brief."))


@pytest.mark.parametrize("version", FILES)
def test_text_that_is_no_unicode_is_refused(version: str) -> None:
    template = find_template(tokenizer(version))
    for system, question in (("", "a\ud800"), ("\udfffb", "a")):
        with pytest.raises(ValueError, match="not valid Unicode at character"):
            template.encode_chat(talk(question, system=system))


# --- fill-in-the-middle


@pytest.mark.parametrize(
    ("version", "want"),
    [
        ("v3", [1, 13, 1575, 2086, 11, 1569, 1053, 29500]),
        ("v7", [1, 13, 1575, 2086, 11, 1569, 1053, 29500]),
        ("tekken_240718", [1, 16, 3004, 2460, 14, 3149, 1284, 1040]),
    ],
)
def test_fill_in_the_middle(version: str, want: list[int]) -> None:
    assert find_template(tokenizer(version)).encode_fim("def f(", "return x") == want


@pytest.mark.parametrize("version", ["v1", "v2", "mistrallite"])
def test_models_that_do_not_fill_in_the_middle(version: str) -> None:
    template = find_template(tokenizer("v1" if version == "mistrallite" else version), release=version)
    with pytest.raises(TemplateError, match="Codestral"):
        template.encode_fim("def f(", "return x")


def test_texts_are_not_encoded_again_and_the_oldest_are_forgotten() -> None:
    asked: list[str] = []

    class Inner:
        def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
            asked.append(s)
            return [int(bos), int(eos), *map(ord, s)]

    inner = remember(Inner(), most=10)
    first = inner.encode("abcde", bos=False, eos=True)
    first.append(-1)  # the caller's own list
    assert inner.encode("abcde", False, True) == [0, 1, *map(ord, "abcde")]
    assert asked == ["abcde"]
    assert inner.encode("abcde", True, True)[0] == 1  # another question
    inner.encode("fgh", False, False)  # the oldest no longer fits
    inner.encode("abcde", True, True)
    inner.encode("x" * 11, False, False)  # longer than all that is kept
    assert asked == ["abcde", "abcde", "fgh", "x" * 11]
    inner.encode("abcde", False, True)
    assert asked[-1] == "abcde"
