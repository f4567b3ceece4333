"""Conversations in files: they go on as they would have, whole or not at all, and only with the model they are of."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral.chat.conversation import Chat
from mistral.chat.messages import Message
from mistral.chat.session import SessionError
from mistral.chat.session import load as load_session
from mistral.chat.session import save as save_session
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from mistral.formats.fingerprint import fingerprint
from mistral.loader.load import load
from tests.support.folders import make_folder, random_state

MODEL = "a fingerprint"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(make_folder(tmp_path_factory.mktemp("model"), sliding_window=9), device="cpu", kernels=False)


def make_chat(loaded: Any, **options: Any) -> Chat:
    template = find_template(loaded.tokenizer)
    return Chat(
        loaded.model, loaded.tokenizer, template, **{"max_tokens": 6, "temperature": 0.9, "stop": [], **options}
    )


def ask(chat: Chat, question: str) -> list[int]:
    list(chat.answer(question))
    return chat.messages[-1].ids or []


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_conversation_goes_on_as_it_would_have(loaded: Any, tmp_path: Path, temperature: float) -> None:
    chat = make_chat(loaded, seed=4, temperature=temperature, system="Be bríef.", top_k=50)
    ask(chat, "Hi\nthere 🙂")
    ask(chat, "Bye")
    chat.undo()
    save_session(chat, tmp_path / "chat.json", MODEL)
    other = make_chat(loaded, seed=99, temperature=0.1, max_tokens=3)
    ask(other, "Something else")
    load_session(other, tmp_path / "chat.json", MODEL)
    assert (other.messages, other.system, other.seed, other.answers) == (chat.messages, chat.system, 4, 2)
    assert replace(other.params, seed=None) == replace(chat.params, seed=None)
    assert [ask(chat, q) for q in ("And?", "So?")] == [ask(other, q) for q in ("And?", "So?")]
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_no_system_prompt_and_an_empty_one(loaded: Any, tmp_path: Path) -> None:
    """They differ where a template has a prompt of its own, and stay what they are in a file."""
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% if messages[0].role != 'system' %}Be kind.{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = find_template(loaded.tokenizer, name=str(own))
    path, lengths = tmp_path / "chat.json", []
    for system, told in (("", None), (Message("system", ""), Message("system", ""))):
        chat = Chat(loaded.model, loaded.tokenizer, template, system=system, max_tokens=2)
        assert (chat.system, chat.system_message) == ("", told)
        ask(chat, "Hi")
        lengths.append(chat.prefilled_tokens)
        save_session(chat, path, MODEL)
        other = Chat(loaded.model, loaded.tokenizer, template, system="Another.", max_tokens=2)
        load_session(other, path, MODEL)
        assert other.system_message == told
    assert lengths[0] > lengths[1]
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"system_is_empty": 1}))
    with pytest.raises(SessionError, match="system_is_empty is 1"):
        load_session(chat, path, MODEL)


def test_written_whole_or_not_at_all(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, path = make_chat(loaded), tmp_path / "chat.json"
    save_session(chat, path, MODEL)
    before = path.read_bytes()
    ask(chat, "Hi")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(SessionError, match=r"cannot be written: No space left on device"):
                save_session(chat, path, MODEL)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_session(chat, path, MODEL)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    save_session(chat, path, MODEL)
    assert path.read_bytes() != before


def test_nothing_else_is_replaced(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("Chapter 1")
    (tmp_path / "other.json").write_text('{"format": "another"}')
    for name in ("novel.txt", "other.json", "."):
        with pytest.raises(SessionError):
            save_session(make_chat(loaded), tmp_path / name, MODEL)
    assert (tmp_path / "novel.txt").read_text() == "Chapter 1"
    with pytest.raises(SessionError, match="cannot be written: No such file or directory"):
        save_session(make_chat(loaded), tmp_path / "nowhere" / "chat.json", MODEL)
    with pytest.raises(SessionError, match="cannot be read: No such file or directory"):
        load_session(make_chat(loaded), tmp_path / "nowhere", MODEL)


def test_any_name_is_written_or_refused(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("~no-such-user/chat.json", tmp_path / ("x" * 300), tmp_path / "file" / "x", tmp_path / "a\0b"):
        with pytest.raises(SessionError, match="cannot be written: "):
            save_session(make_chat(loaded), name, MODEL)
        with pytest.raises(SessionError):
            load_session(make_chat(loaded), name, MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    longest = tmp_path / ("é" * 127)  # 254 bytes, of 255 that a name may have
    save_session(make_chat(loaded), longest, MODEL)
    load_session(make_chat(loaded), longest, MODEL)


@pytest.mark.skipif(sys.platform == "win32", reason="links take a privilege there")
def test_a_link_stays_a_link(loaded: Any, tmp_path: Path) -> None:
    link, path = tmp_path / "link.json", tmp_path / "chat.json"
    save_session(make_chat(loaded, seed=1), path, MODEL)
    link.symlink_to(path)
    save_session(make_chat(loaded, seed=2), link, MODEL)
    assert link.is_symlink()
    assert json.loads(path.read_text())["seed"] == 2


@pytest.mark.parametrize(("stop", "told"), [("wolf", ["wolf"]), (("a", "b"), ["a", "b"]), (None, []), ([], [])])
def test_stop_as_generation_takes_it(loaded: Any, tmp_path: Path, stop: Any, told: list[str]) -> None:
    save_session(make_chat(loaded, stop=stop), tmp_path / "chat.json", MODEL)
    chat = make_chat(loaded, stop=["something else"])
    load_session(chat, tmp_path / "chat.json", MODEL)
    assert list(chat.params.stop) == told
    with pytest.raises(SessionError, match="cannot be written: .*surrogates"):
        save_session(make_chat(loaded, stop="\udcff"), tmp_path / "other.json", MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize("key", ["seed", "answers", "max_tokens", "top_k"])
def test_large_numbers_are_refused_or_answered_with(loaded: Any, tmp_path: Path, key: str) -> None:
    path = tmp_path / "chat.json"
    save_session(make_chat(loaded, seed=1), path, MODEL)
    good = json.loads(path.read_text())
    for value in (10**18, 2**63, 2**64, 10**30, -(10**30)):
        chat = make_chat(loaded, seed=1, stop=["\n", "e", "a"])
        path.write_text(json.dumps({**good, "stop": list(chat.params.stop), key: value}))
        try:
            load_session(chat, path, MODEL)
        except SessionError:
            continue
        assert ask(chat, "Hi")


def test_files_from_before_penalties_and_functions(loaded: Any, tmp_path: Path) -> None:
    """Keys that a file does not have are at their defaults; biases and penalties survive; a function is refused."""
    path = tmp_path / "chat.json"
    chat = make_chat(loaded, seed=4, logit_bias={7: -2}, repetition_penalty=1.2)
    ask(chat, "Hi")
    save_session(chat, path, MODEL)
    other = make_chat(loaded, seed=9)
    load_session(other, path, MODEL)
    assert other.params == chat.params
    assert ask(other, "Bye") == ask(chat, "Bye")
    told = json.loads(path.read_text())
    new = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "top_logprobs")
    path.write_text(json.dumps({key: value for key, value in told.items() if key not in new}))
    load_session(other, path, MODEL)
    assert other.params == replace(chat.params, logit_bias=(), repetition_penalty=1.0)
    other.params = replace(other.params, logits_processor=lambda prompt, output, logits: logits)
    with pytest.raises(SessionError, match="logits_processor"):
        save_session(other, tmp_path / "new.json", MODEL)


def test_version_1_is_read(loaded: Any, tmp_path: Path) -> None:
    """Saved before messages had roles: a list of turns."""
    chat = make_chat(loaded, seed=3)
    ask(chat, "Hi")
    ask(chat, "Bye")
    save_session(chat, tmp_path / "new.json", MODEL)
    told = json.loads((tmp_path / "new.json").read_text())
    assert told["version"] == 2
    messages = told.pop("messages")
    pairs = zip(messages[::2], messages[1::2], strict=True)
    turns = [{"question": q["content"], "answer": a["ids"], "text": a["content"]} for q, a in pairs]
    (tmp_path / "old.json").write_text(json.dumps({**told, "version": 1, "turns": turns}))
    other = make_chat(loaded, seed=99)
    load_session(other, tmp_path / "old.json", MODEL)
    assert (other.messages, other.answers) == (chat.messages, 2)
    assert ask(other, "More") == ask(chat, "More")


BROKEN: dict[str, Any] = {
    "format": ["mistral", None, 3, ["mistral conversation"]],
    "version": [0, 3, "1", None, True, 10**30],
    "model": ["another", None, 5],
    "template": ["v3", None, ["v1"]],
    "system": [None, 3, ["a"], "\ud800"],
    "seed": ["1", 1.5, None, True],
    "answers": ["1", None, [0]],
    "temperature": ["hot", -1, None, True, [1], float("nan"), float("inf"), 10**400],
    "top_p": [2, "x"],
    "top_k": [-1, 1.5],
    "max_tokens": [-1, "6", 1.5, True],
    "stop": ["x", [""], [3], ["\ud800"], None],
    "messages": [
        *(None, {}, [1], [{}], [{"role": "user", "content": 3}], [{"role": "user"}]),
        *(
            [{"role": "tool", "content": "a"}],
            [{"role": ["user"], "content": "a"}],
            [{"role": "user", "content": "\ud800"}],
        ),
        *([{"role": "assistant", "content": "a", "ids": ids}] for ids in ([-1], [4096], [True], ["1"], 3)),
    ],
}
TURNS = [
    {"question": 3, "answer": [1], "text": "a"},
    {"question": "a", "answer": None, "text": "a"},
    {"question": "a", "answer": [-1], "text": "a"},
    {"question": "a", "answer": [4096], "text": "a"},
    {"question": "a", "answer": [True], "text": "a"},
    {"question": "a", "answer": ["1"], "text": "a"},
    {"question": "a\ud800", "answer": [1], "text": "a"},
    {"question": "a", "answer": [1], "text": "a\ud800"},
]


def test_broken_files_change_nothing(loaded: Any, tmp_path: Path) -> None:
    chat, path = make_chat(loaded, seed=3, system="Be brief."), tmp_path / "chat.json"
    ask(chat, "Hi")
    save_session(chat, path, MODEL)
    good = json.loads(path.read_text(encoding="utf-8"))
    load_session(chat, path, MODEL)
    broken = [json.dumps({**good, key: value}) for key, values in BROKEN.items() for value in values]
    broken += [json.dumps({**good, "version": 1, "turns": turns}) for turns in (None, {}, [1], *([t] for t in TURNS))]
    broken += [
        json.dumps({k: v for k, v in good.items() if k != key}) for key in ("format", "model", "seed", "messages")
    ]
    broken += ["", "[]", "null", "{", json.dumps(good)[:-9], "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
    state = [list(chat.messages), chat.system, chat.seed, chat.answers, chat.params]
    for text in broken:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(SessionError) as told:
            load_session(chat, path, MODEL)
        assert "\n" not in str(told.value)
        assert len(str(told.value)) < 600
        assert state == [chat.messages, chat.system, chat.seed, chat.answers, chat.params], text[:200]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SessionError):
        load_session(chat, path, MODEL)


# --- which model


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n["c"]\n', "it holds 3 lines of JSON, as files of prompts and samples do"),
        ('{"prompt": "a"}\n{"prompt":\n', "it holds no JSON"),
        ("", "it holds no JSON"),
        ("Hi", "it holds no JSON"),
    ],
)
def test_what_a_file_holds_that_is_no_conversation(loaded: Any, tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SessionError, match=f"a.jsonl is not a conversation: {said}"):
        load_session(make_chat(loaded), tmp_path / "a.jsonl", MODEL)


def test_a_model_is_the_same_in_any_layout_and_form(tmp_path: Path) -> None:
    state = random_state()
    folder = make_folder(tmp_path / "single", state)
    want = fingerprint(folder)
    assert len(want) == 64
    for form in ("parts", "pth"):
        assert fingerprint(make_folder(tmp_path / form, state, form)) == want
    convert(folder, tmp_path / "hf", "hf")
    assert fingerprint(tmp_path / "hf") == want
    convert(tmp_path / "hf", tmp_path / "back", "mistral")
    assert fingerprint(tmp_path / "back") == want


def test_another_model_is_another(tmp_path: Path) -> None:
    state = random_state()
    seen = {fingerprint(make_folder(tmp_path / "model", state))}
    changed = [name for name in state if not name.endswith(("wq.weight", "wk.weight"))]
    for i, name in enumerate(changed):
        other = {n: t.clone() for n, t in state.items()}
        other[name].view(-1)[1] += 0.01
        seen.add(fingerprint(make_folder(tmp_path / f"weights{i}", other)))
    for i, params in enumerate(({"sliding_window": 6}, {"rope_theta": 1e5}, {"norm_eps": 1e-6})):
        seen.add(fingerprint(make_folder(tmp_path / f"params{i}", state, **params)))
    assert len(seen) == 1 + len(changed) + 3
    folder = make_folder(tmp_path / "words", state)
    shutil.copy(folder / "tokenizer.model", folder / "tokenizer.model.v1")
    with (folder / "tokenizer.model.v1").open("ab") as file:
        file.write(b"\x18\x00")
    assert fingerprint(folder) not in seen
