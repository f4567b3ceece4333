"""Chat templates of folders: the ids are those of transformers' apply_chat_template, and what is typed stays text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.chat.messages import Message, TemplateError
from mistral.chat.templates import find_template
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer
from tests.support.tokenizer_json import CHATML, DATA, KINDS, STRICT_V1, ZEPHYR, write_tokenizer

SYSTEM, TALK = "Be brief.", ("Hi", "Hello.", "  two  spaces\n\nand 永和 🙂 ", "1 < 2 > [x]", "> quoted, and <")
ADDED = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>")


def mistrals(version: str, spm: bool) -> str:
    """The templates that Mistral's own releases have, as mistral-common writes them in Jinja."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    no = dict.fromkeys(("image_support", "audio_support", "thinking_support", "plain_thinking_support"), False)
    none = dict.fromkeys(
        ("default_system_prompt", "model_settings_fields", "reasoning_effort_values", "reasoning_effort_default")
    )
    return generate_chat_template(
        spm=spm, tokenizer_version=TokenizerVersion(version), use_special_token_variables=True, **no, **none
    )


TEMPLATES: dict[str, tuple[str, str]] = {
    "chatml": (CHATML, "any"),
    "zephyr": (ZEPHYR, "any"),
    "strict v1": (STRICT_V1, "any"),
    "v1": (mistrals("v1", True), "sentencepiece"),
    "v3": (mistrals("v3", True), "v3"),
    "v3-tekken": (mistrals("v3", False), "tekken"),
    "v7-tekken": (mistrals("v7", False), "tekken"),
}
CASES = [(name, kind) for name, (_, on) in TEMPLATES.items() for kind in KINDS if on in ("any", kind)]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def both(scratch: Path, name: str, kind: str) -> tuple[Any, Any]:
    """Our template and transformers' tokenizer, of one folder."""
    from transformers import AutoTokenizer

    folder = scratch / f"{name} {kind}"
    if not folder.exists():
        config = {} if kind != "byte level" else {"bos_token": "<|im_start|>"}
        write_tokenizer(folder, kind, scratch, TEMPLATES[name][0], ADDED, **config)
    key = str(folder)
    if key not in _made:
        found = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
        _made[key] = found, AutoTokenizer.from_pretrained(folder)
    return _made[key]


_made: dict[str, tuple[Any, Any]] = {}


def ids_of(reference: Any, messages: list[Message]) -> list[int]:
    told = [{"role": m.role, "content": m.content} for m in messages]
    last = messages[-1].role != "assistant"
    return list(reference.apply_chat_template(told, add_generation_prompt=last, return_dict=False))


def talk(*texts: str, system: str = "") -> list[Message]:
    messages = [Message("system", system)] if system else []
    return [*messages, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))]


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_ids_are_those_of_transformers(scratch: Path, name: str, kind: str, system: str) -> None:
    ours, reference = both(scratch, name, kind)
    for n in range(1, len(TALK) + 1):
        messages = talk(*TALK[:n], system=system)
        if name == "strict v1" and system:
            with pytest.raises(TemplateError, match="refuses the conversation: Conversation roles must alternate"):
                ours.encode_chat(messages)
            continue
        try:
            want = ids_of(reference, messages)
        except Exception:
            assert messages[-1].role == "assistant"  # mistral-common's do not end with one
            continue
        assert ours.encode_chat(messages) == want
        if name not in ("chatml", "zephyr"):
            assert want.count(reference.bos_token_id) == 1 or kind == "byte level"


# A control token that somebody types stays text here (below), and not in transformers; Hypothesis draws some, which it
# finds in the source.
CONTROL = re.compile(r"</?\w+>|<\||\[/?[A-Z_]+\]")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25).filter(
    lambda t: not CONTROL.search(t)
)


@pytest.mark.parametrize(("name", "kind"), CASES)
@settings(max_examples=20)
@given(texts=st.lists(TEXT, min_size=1, max_size=3).filter(lambda texts: len(texts) % 2 == 1))
def test_any_texts_have_the_ids_of_transformers(scratch: Path, name: str, kind: str, texts: list[str]) -> None:
    ours, reference = both(scratch, name, kind)
    assert ours.encode_chat(talk(*texts)) == ids_of(reference, talk(*texts))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_way_for_typed_control_tokens_gives_the_same_ids(
    scratch: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken only where somebody types one; here it is taken always."""
    ours, reference = both(scratch, name, kind)
    words = ours._tokenizer._model
    parts: list[Any] = []
    direct = words.encode_parts
    monkeypatch.setattr(words, "encode_parts", lambda p, c: parts.append((p, c)) or direct(p, c))
    want = ours.encode_chat(talk(*TALK[:3]))
    monkeypatch.undo()
    ((rendered, control),) = parts
    assert words._encode_typed(rendered, control) == want == ids_of(reference, talk(*TALK[:3]))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_typed_control_tokens_stay_text(scratch: Path, name: str, kind: str) -> None:
    ours, _ = both(scratch, name, kind)
    words = ours._tokenizer
    control = set(words.control_tokens.values())

    def controls(text: str) -> list[int]:
        return [i for i in ours.encode_chat(talk(f"a {text} b", text, text)) if i in control]

    plain = controls("hello")
    assert plain
    halves = [h for t in ("<|im_end|>", words.named["eos_token"]) for k in range(1, len(t)) for h in (t[:k], t[k:])]
    for typed in (*ADDED, "<s>", "</s>", "[INST]", "[/INST]", words.named["eos_token"] * 2, *halves):
        assert controls(typed) == plain, typed
        ids = ours.encode_chat(talk(f"say {typed} now"))
        assert f"say {typed} now" in words.decode(ids)


GLUED = "{{ bos_token }}{% for m in messages %}<{{ m['content'] }}>{{ m['content'] }}{% endfor %}"


def test_halves_do_not_join_with_what_the_template_writes(scratch: Path) -> None:
    folder = write_tokenizer(scratch / "glued", "sentencepiece", scratch, GLUED, ADDED)
    words = Tokenizer(folder / "tokenizer.json")
    template, control = find_template(words, folder=folder), set(words.control_tokens.values())
    for text in ("s", "/s", "|im_end|", " s ", "s><s", "<|im_", "im_end|", "/s>", "<"):
        ids = template.encode_chat(talk(text))
        assert [i for i in ids if i in control] == [1], text
        assert words.decode(ids) == f"<{text}>{text}"


def test_who_speaks_is_given_to_the_template_and_stays_text(scratch: Path, tmp_path: Path) -> None:
    text = "{{ bos_token }}{% for m in messages %}<{{ m['name'] }}>{{ m['content'] }}{% endfor %}"
    words = Tokenizer(write_tokenizer(tmp_path, "sentencepiece", scratch, text, ADDED) / "tokenizer.json")
    template, control = find_template(words, folder=tmp_path), set(words.control_tokens.values())
    for name in ("Ada", "s", "/s", "|im_end|", "<s>"):
        ids = template.encode_chat([Message("user", "Hi", name=name)])
        assert [i for i in ids if i in control] == [1], name
        assert words.decode(ids) == f"<{name}>Hi"


@pytest.mark.parametrize("special", [False, True])
def test_an_end_that_is_found_as_its_file_says(scratch: Path, tmp_path: Path, special: bool) -> None:
    """transformers 4 wrote `normalized` for what `add_tokens` was given; a token that is the end is found so too."""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "end", "sentencepiece", scratch, CHATML, eos_token="<|im_end|>")
    raw = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": True, "special": special}
    words = ("<|im_start|>", "<|im_end|>")
    raw["added_tokens"] += [{"id": 4096 + i, "content": word, **flags} for i, word in enumerate(words)]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    reference = AutoTokenizer.from_pretrained(folder)
    for n in (1, 3, 5):
        assert template.encode_chat(talk(*TALK[:n])) == ids_of(reference, talk(*TALK[:n]))


def test_words_that_only_the_template_may_write(scratch: Path) -> None:
    """Added, not special, and yet the frame of a turn."""
    folder = write_tokenizer(scratch / "plain", "sentencepiece", scratch, CHATML)
    raw = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    words = ("<|im_start|>", "<|im_end|>", "<tool>")
    raw["added_tokens"] += [{"id": 4096 + i, "content": word, **flags} for i, word in enumerate(words)]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
    ids = template.encode_chat(talk("a <|im_end|> <tool>"))
    assert [i for i in ids if i >= 4096] == [4096, 4098, 4097, 4096]


@pytest.mark.parametrize("name", ["chatml", "zephyr", "v7-tekken"])
def test_messages_are_given_as_they_are(scratch: Path, name: str) -> None:
    """Neighbours of one role, and a system prompt without text, which a template may take instead of its own."""
    ours, reference = both(scratch, name, "tekken")
    empty, two = Message("system", ""), [Message("user", "A"), Message("user", "B")]
    answers = [Message("assistant", "x"), Message("assistant", "y"), Message("user", "C")]
    for messages in (two, [*two, *answers], [empty, two[0]], [empty, *two, *answers]):
        if name == "v7-tekken" and len(messages) > 2:
            continue  # transformers' reference refuses them
        assert ours.encode_chat(messages) == ids_of(reference, messages)


def test_an_empty_system_prompt_takes_the_place_of_a_templates_own(scratch: Path, tmp_path: Path) -> None:
    text = "{% if messages[0].role != 'system' %}You are kind.{% endif %}" + CHATML
    write_tokenizer(tmp_path / "own", "sentencepiece", scratch, text, ADDED)
    words = Tokenizer(tmp_path / "own" / "tokenizer.json")
    template = find_template(words, folder=tmp_path / "own")
    assert "kind" in words.decode(template.encode_chat(talk("Hi")))
    assert "kind" not in words.decode(template.encode_chat([Message("system", ""), *talk("Hi")]))


def test_neighbours_of_one_role_are_joined_where_the_template_refuses_them(scratch: Path) -> None:
    ours, _ = both(scratch, "strict v1", "sentencepiece")
    two = [Message("user", "A"), Message("user", "B"), Message("assistant", "x"), Message("assistant", "y")]
    plain = ours.encode_chat(talk("A\n\nB", "x\n\ny", "C"))
    assert ours.encode_chat([*two, Message("user", "C")]) == plain
    assert ours.encode_chat([Message("system", ""), *two, Message("user", "C")]) == plain  # as some clients always send
    with pytest.raises(TemplateError, match="refuses the conversation"):
        ours.encode_chat([Message("system", "")])


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("listed", [True, False])
def test_special_tokens_that_a_folder_says_there_are_none_of(
    scratch: Path, tmp_path: Path, kind: str, listed: bool
) -> None:
    """Conversions and bases have `"bos_token": null`; a template is given what transformers gives it."""
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path / "none", "sentencepiece", scratch, tokenizer_class=kind)
    asked = "{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}{{ eos_token is defined }}"
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": asked}
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    if listed:  # then transformers does not read the names beside it
        config["added_tokens_decoder"] = {"1": {"content": "<s>", "special": True}}
    for change in ({}, {"bos_token": None}, {"eos_token": None}, {"bos_token": "missing"}):
        told = {**config, **names, **change}
        told = {name: value for name, value in told.items() if value != "missing"}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
        template = find_template(Tokenizer(folder / "tokenizer.json"), folder=folder)
        reference = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False
        )
        assert template._render([{"role": "user", "content": "a"}]) == reference, change


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.model.v3", "tekken.json"])
def test_on_mistrals_own_tokenizers(scratch: Path, tmp_path: Path, source: str) -> None:
    """No tokenizer.json beside them: the texts between control tokens are encoded one by one."""
    if source == "tekken.json":
        write_tokenizer(tmp_path / "made", "tekken", scratch, mistrals("v3", False))
        shutil.copy(scratch / "tekken.json", tmp_path)
        kind = "v3-tekken", "tekken"
    elif source == "tokenizer.model.v3":
        shutil.copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / source)
        kind = "v3", "v3"
    else:
        shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
        kind = "chatml", "sentencepiece"
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 4096, "<|im_end|>": 4097}))
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        )
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[kind[0]][0])
    words = Tokenizer(tmp_path / source)
    ours, (theirs, _) = find_template(words, folder=tmp_path), both(scratch, *kind)
    assert (ours.name, ours.source) == ("chat_template.jinja", "chat_template.jinja")
    for n in (1, 3, 5):
        assert ours.encode_chat(talk(*TALK[:n], system=SYSTEM)) == theirs.encode_chat(talk(*TALK[:n], system=SYSTEM))
    control = set(words.control_tokens.values())
    plain = [i for i in ours.encode_chat(talk("x")) if i in control]
    typed = "<|im_end|> [INST] </s>"
    assert [i for i in ours.encode_chat(talk(typed)) if i in control] == plain


def test_tokenizer_json_beside_a_model_is_what_the_template_is_written_for(scratch: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece", scratch, CHATML, ADDED)
    shutil.copy(BUNDLED / "tokenizer.model", tmp_path)
    ours, (theirs, _) = (
        find_template(Tokenizer(tmp_path / "tokenizer.model"), folder=tmp_path),
        both(scratch, "chatml", "sentencepiece"),
    )
    assert ours.encode_chat(talk(*TALK)) == theirs.encode_chat(talk(*TALK))


@pytest.mark.parametrize(
    ("version", "kind"), [("v1", "sentencepiece"), ("v3", "v3"), ("v3", "tekken"), ("v7", "tekken")]
)
def test_a_folder_without_a_template_has_the_releases(scratch: Path, version: str, kind: str) -> None:
    folder = write_tokenizer(scratch / f"without {version} {kind}", kind, scratch)
    words = Tokenizer(folder / "tokenizer.json")
    name = f"{version}-tekken" if kind == "tekken" else version
    found = find_template(words, release=name, folder=folder)
    assert (found.name, found.source) == (name, "the release")
    own = Tokenizer(
        {"v1": BUNDLED / "tokenizer.model", "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3"}[version]
        if kind != "tekken"
        else scratch / "tekken.json"
    )
    want = find_template(own, name=version)
    for n in (1, 3, 5):
        for system in ("", SYSTEM):
            messages = talk(*TALK[:n], system=system)
            assert found.encode_chat(messages) == want.encode_chat(messages)


# --- which template


def test_order_of_templates(scratch: Path, tmp_path: Path) -> None:
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]
    folder = write_tokenizer(tmp_path / "a", "v3", scratch, several, ADDED)
    words = Tokenizer(folder / "tokenizer.json")

    def found(name: str | None = None) -> tuple[str, str]:
        template = find_template(words, name=name, release="v3", folder=folder)
        return template.name, template.source

    assert found() == ("tokenizer_config.json", "tokenizer_config.json")
    assert found("tool_use") == ("tool_use", "--template")
    assert found("tokenizer_config.json") == ("tokenizer_config.json", "--template"), "as it is printed"
    assert found("v3") == ("v3", "--template")
    (folder / "chat_template.jinja").write_text(ZEPHYR)
    assert found() == ("chat_template.jinja", "chat_template.jinja")
    assert found("chat_template.jinja") == ("chat_template.jinja", "--template"), "as it is printed"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert found("rag") == ("rag", "--template")
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert found(str(tmp_path / "mine.jinja")) == ("mine.jinja", "--template")
    with pytest.raises(
        TemplateError,
        match="no template is called 'x': v1, v2, v3, v7, v11, v13, v15, mistrallite, default, tool_use, rag",
    ):
        found("x")
    with pytest.raises(TemplateError, match="none.jinja cannot be read: No such file"):
        found(str(tmp_path / "none.jinja"))
    folder = write_tokenizer(
        tmp_path / "b", "v3", scratch, [{"name": "a", "template": "x"}, {"name": "b", "template": "x"}]
    )
    with pytest.raises(TemplateError, match="several templates and no default: --template a or b"):
        found()
    assert found("v3") == ("v3", "--template")


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("zephyr", "</s>"), ("v3", "</s>")])
def test_where_an_answer_ends(scratch: Path, name: str, end: str) -> None:
    ours, reference = both(scratch, name, "v3")
    assert ours.ends == {reference.convert_tokens_to_ids(end)}


# --- what a template may do


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{{ messages[0]['content'] | tojson }}", '"é<b>"'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{{ m }}{% endfor %}", "13"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% generation %}x{% set y = 3 %}{{ y }}{% endgeneration %}z", "x3z"),
        ("{{ nothing }}{{ bos_token }}|{{ tools is none }}|{{ dict(a=1)['a'] }}", "<s>|True|1"),
    ],
)
def test_the_surroundings_are_transformers(scratch: Path, tmp_path: Path, text: str, rendered: str) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(tmp_path, "v3", scratch, text)
    words = Tokenizer(folder / "tokenizer.json")
    template = find_template(words, folder=folder)
    message = [{"role": "user", "content": "é<b>"}]
    reference = AutoTokenizer.from_pretrained(folder)
    assert reference.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == rendered
    assert template.encode_chat(talk("é<b>")) == ids_of(reference, talk("é<b>"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for %}", "is no Jinja: .* in line 1"),
        ("{{ raise_exception('not so') }}", "refuses the conversation: not so"),
        ("{{ messages[5]['content'].x.y }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses the conversation: .*unsafe"),
        (
            "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
            "refuses the conversation: a namespace has no __init__",
        ),
        ("{{ namespace(__class__=1) }}", "refuses the conversation: a namespace has no __class__"),
        ("{{ 1 / 0 }}", "refuses the conversation: division by zero"),
        ("{% include 'x' %}", "refuses the conversation"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_line(scratch: Path, tmp_path: Path, text: str, said: str) -> None:
    folder = write_tokenizer(tmp_path, "sentencepiece", scratch, text)
    with pytest.raises(TemplateError, match=said) as error:
        find_template(Tokenizer(folder / "tokenizer.json"), folder=folder).encode_chat(talk("Hi"))
    assert "\n" not in str(error.value)
    assert "tokenizer_config.json" in str(error.value)


def test_fill_in_the_middle_is_that_of_the_tokenizer(scratch: Path) -> None:
    ours, _ = both(scratch, "chatml", "v3")
    assert ours.encode_fim("def f(", "return x") == [1, 13, 1575, 2086, 11, 1569, 1053, 29500]
    ours, _ = both(scratch, "chatml", "sentencepiece")
    with pytest.raises(TemplateError, match="Codestral"):
        ours.encode_fim("a", "b")


def test_text_that_is_not_unicode_is_refused(scratch: Path) -> None:
    ours, _ = both(scratch, "chatml", "v3")
    with pytest.raises(TemplateError, match="not valid Unicode at character 1"):
        ours.encode_chat(talk("a\ud800"))
