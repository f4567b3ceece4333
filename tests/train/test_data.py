"""Samples from JSON lines: the forms that are read, what is cut, and what is refused with file and line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.chat.templates import find_template
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer
from mistral.train.conversations import Marked, Turn, mark_text, mark_turns
from mistral.train.data import DataError, Samples, read_samples

TOKENIZER = Tokenizer(BUNDLED / "tokenizer.model")
TEMPLATE = find_template(TOKENIZER)
ASK = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "The king."}
CALL = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "content": "1", "tool_call_id": "a"}


def read(path: Path, *lines: Any, seq_len: int = 100) -> Samples:
    """The samples of a file with these lines: objects, or texts as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")

    def turns(value: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
        return mark_turns(TEMPLATE, value, tools, TOKENIZER.eos_ids)

    return read_samples(path, lambda prompt, text: mark_text(TOKENIZER, prompt, text), turns, seq_len)


def learned(samples: Samples, which: int = 0) -> str:
    """The text that counts, its end as |."""
    sample = samples.samples[which]
    parts = [(i, w) for i, w in zip(sample.ids, sample.weights, strict=True) if w]
    return "".join("|" if i == TOKENIZER.eos_id else f" {TOKENIZER.decode([i])}" for i, _ in parts)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ({"messages": [ASK, ANSWER]}, "The king."),
        ({"interactions": [ASK, ANSWER]}, "The king."),
        ({"messages": [{"role": "developer", "content": "Be brief."}, ASK, ANSWER]}, "The king."),
        ({"messages": [ASK, ANSWER, ASK, {"role": "assistant", "content": "The wolf."}]}, "The king.|The wolf."),
        ({"messages": [ASK, {**ANSWER, "weight": 0}, ASK, {"role": "assistant", "content": "The wolf."}]}, "The wolf."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, ANSWER]}, "The king."),
        ({"text": "The king."}, "The king."),
        ({"prompt": "Who is it?", "completion": " The king."}, "The king."),
        ({"prompt": "Who is it?\n", "completion": "The king."}, "The king."),
    ],
    ids=str,
)
def test_answers_and_their_ends_are_learned(tmp_path: Path, line: dict[str, Any], want: str) -> None:
    samples = read(tmp_path / "x.jsonl", line)
    assert len(samples.samples) == 1
    squeezed = learned(samples).replace(" ", "")
    assert squeezed == want.replace(" ", "") + "|"
    assert samples.samples[0].ids[0] == TOKENIZER.bos_id
    assert samples.notes == []


def test_weights_of_answers_are_kept(tmp_path: Path) -> None:
    samples = read(tmp_path / "x.jsonl", {"messages": [ASK, {**ANSWER, "weight": 0.25}]})
    assert set(samples.samples[0].weights) == {0, 0.25}


WRONG = [
    ("{", "not JSON"),
    ("[]", "must be an object"),
    ({}, 'it has none of "messages", "text", and "prompt" with "completion"'),
    ({"text": 3}, "text must be a text, not 3"),
    ({"completion": "a"}, "it has no prompt"),
    ({"completion": "a", "prompt": None}, "prompt must be a text, not None"),
    ({"promt": "a", "completion": "b"}, "it has no prompt; not known: 'promt'"),
    ({"promt": "a"}, "with \"completion\"; not known: 'promt'; did you mean prompt?"),
    (
        {"conversations": [{"from": "human", "value": "a"}]},
        'the form of ShareGPT, which is not read: write it as {"mess',
    ),
    ({"instruction": "a", "input": "", "output": "b"}, "the form of Alpaca, which is not read: write it as"),
    ({"text": "a", "messages": [ASK, ANSWER]}, "it has 'messages' and 'text': give each a line of its own"),
    ({"text": ""}, "its text is empty, so there is nothing to learn"),
    ({"messages": "a"}, "messages must be a list"),
    ({"messages": [3]}, "messages[0] must be an object"),
    ({"messages": [{"role": "king", "content": "a"}]}, "the role 'king'"),
    ({"messages": [ASK]}, "the last message is not the assistant's"),
    ({"messages": [ASK, ANSWER, ANSWER]}, "messages[2] is an answer behind an answer"),
    ({"messages": [{**ASK, "weight": 1}, ANSWER]}, "only messages of the assistant are learned"),
    ({"messages": [ASK, {**ANSWER, "weight": -1}]}, "the weight -1"),
    ({"messages": [ASK, {**ANSWER, "weight": True}]}, "the weight True"),
    ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "answer without content"),
    ({"messages": [ASK, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "images and sound"),
    ({"messages": [ASK, {**ANSWER, "function_call": {}}]}, "function_call, which is not supported: give tool_calls"),
    ({"messages": [ASK, ANSWER], "functions": []}, "functions, which is not supported: give tools"),
    ({"messages": [ASK, RESULT, ANSWER]}, "nothing was called before it"),
    ({"messages": [{"role": "system", "content": "a"}, ANSWER]}, "needs a message of the user"),
    ({"messages": [ASK, {"role": "assistant", "content": "a\ud800"}]}, "not valid Unicode"),
    ({"messages": [ASK, ANSWER], "tools": [{"type": "function"}]}, "tools: "),
]


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_line_is_named(tmp_path: Path, line: Any, said: str) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError) as error:
        read(path, {"text": "good"}, "", line)
    assert str(error.value).startswith(f"{path}:3: ")
    assert said in str(error.value)


def test_all_wrong_lines_are_counted_and_some_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError) as error:
        read(path, *({"text": i} for i in range(12)))
    assert str(error.value).count(f"{path}:") == 5
    assert str(error.value).endswith("(and 7 more wrong lines)")


@pytest.mark.parametrize(
    ("lines", "also"),
    [(1, ""), (2, " (also line 2)"), (6, " (also lines 2, 3, 4, 5, 6)"), (9, " (also lines 2, 3, 4, 5, 6 and 3 more)")],
)
def test_a_mistake_of_many_lines_is_told_once(tmp_path: Path, lines: int, also: str) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(DataError) as error:
        read(path, *["[]"] * lines)
    assert str(error.value) == f"{path}:1: it must be an object, not []{also}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "nothing to learn from"),
        (b'{"text": "\xff"}\n', "no file of samples, a JSON object a line: line 1: it is not UTF-8 (byte 0xff)"),
        (b"\x89PNG\n5\n\xff\x01\n", "no file of samples, a JSON object a line: line 1: it is not UTF-8 (byte 0x89)"),
    ],
)
def test_files_without_samples(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=".*") as error:
        read_samples(path, lambda prompt, text: mark_text(TOKENIZER, prompt, text), lambda *_: Marked(), 10)
    assert said in str(error.value)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_samples(tmp_path / "none", lambda prompt, text: Marked(), lambda *_: Marked(), 10)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "The king."}\r\n\r\n{"text": "The wolf."}\r\n')
    found = read_samples(path, lambda prompt, text: mark_text(TOKENIZER, prompt, text), lambda *_: Marked(), 10)
    assert [sample.line for sample in found.samples] == [1, 3]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_mark_is_read_as_every_other_file_is(tmp_path: Path, encoding: str) -> None:
    want = read(tmp_path / "x.jsonl", {"text": "The king\u2028."}, {"text": "The wolf."})
    path = tmp_path / "y.jsonl"
    path.write_bytes((tmp_path / "x.jsonl").read_text(encoding="utf-8").encode(encoding))
    found = read_samples(path, lambda prompt, text: mark_text(TOKENIZER, prompt, text), lambda *_: Marked(), 100)
    assert [sample.ids for sample in found.samples] == [sample.ids for sample in want.samples]
    assert found.sha256 == want.sha256


def test_what_is_ignored_is_said(tmp_path: Path) -> None:
    samples = read(tmp_path / "x.jsonl", {"text": "a", "id": 1}, {"messages": [ASK, {**ANSWER, "mood": 2}], "id": 2})
    assert samples.notes == [f"{tmp_path / 'x.jsonl'}: ignored keys: id (2 times), mood (1 time)"]


def test_long_conversations_are_cut_and_long_texts_split(tmp_path: Path) -> None:
    long = {"messages": [ASK, {"role": "assistant", "content": "The king and the queen. " * 20}]}
    lost = {"messages": [{"role": "user", "content": "The king and the queen. " * 20}, ANSWER]}
    samples = read(tmp_path / "x.jsonl", long, lost, {"text": "The wolf and the fox. " * 20}, seq_len=30)
    lines = [sample.line for sample in samples.samples]
    assert lines[0] == 1
    assert 2 not in lines
    assert lines.count(3) > 3
    assert all(len(sample.ids) <= 31 for sample in samples.samples)
    cut, split, empty = samples.notes
    assert "2 conversations of more than 30 tokens lost " in cut
    assert "1 text of more than 30 tokens was split" in split
    assert "1 sample without an answer that counts is not used" in empty


@given(
    words=st.lists(st.sampled_from(["king", "wolf", "the", "forest"]), min_size=1, max_size=40),
    seq_len=st.integers(2, 9),
)
def test_every_token_of_a_split_text_is_predicted_once(words: list[str], seq_len: int) -> None:
    import tempfile

    text = " ".join(words)
    with tempfile.TemporaryDirectory() as folder:
        samples = read(Path(folder) / "x.jsonl", {"text": text}, seq_len=seq_len).samples
    predicted = [i for s in samples for i, w in zip(s.ids, s.weights, strict=True) if w]
    assert predicted == [*TOKENIZER.encode(text, bos=False), TOKENIZER.eos_id]
    assert all(s.weights[0] == 0 for s in samples)


def test_with_tools_answers_before_the_last_question_do_not_count(tmp_path: Path) -> None:
    """Templates list the tools with the last question only; weights, if any is given, decide instead."""
    said: list[tuple[float, ...]] = []

    def turns(value: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
        said.append(tuple(turn.weight for turn in value if turn.role == "assistant"))
        return Marked([1, 2], [0, 1])

    path, messages = tmp_path / "x.jsonl", [ASK, ANSWER, ASK, CALL, RESULT, ANSWER]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    weighed = [ASK, {**ANSWER, "weight": 1}, *messages[2:]]
    lines = [{"messages": messages, "tools": tools}, {"messages": weighed, "tools": tools}, {"messages": messages}]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    read_samples(path, lambda prompt, text: Marked(), turns, 10)
    assert said == [(0, 1, 1), (1, 1, 1), (1, 1, 1)]
