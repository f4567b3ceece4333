"""What a text is instead of JSON is one line of ours, whoever reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral.batch.lines import LineError, read_line
from mistral.chat.session import _read
from mistral.cli.prompts import read_file
from mistral.eval.longchat import read_questions
from mistral.formats.broken import require_whole
from mistral.formats.hf_files import _weight_map
from mistral.formats.layout import ParamsError, read_object
from mistral.special_tokens import read_json
from mistral.tekken import tekken_words
from mistral.train.conversations import Marked
from mistral.train.data import DataError, read_samples
from mistral.util.errors import FormatError, UsageError
from mistral.util.parsed import parse_json

DEEP = "[" * 100_000
LONG = "9" * 5000


def test_values_are_those_of_json() -> None:
    assert parse_json('{"a": [1, 2.5, null, "\\u00e9"]}') == {"a": [1, 2.5, None, "\u00e9"]}
    assert parse_json(b"[]") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (LONG, "thousands of digits"),
        ("", "^it is empty$"),
        ("hello", "^a value is missing at character 1, where there is 'hello'$"),
        ('{"a": 1', "^a comma or a closing bracket is missing at its end: it is not complete$"),
        ('{"a" 1}', "^a colon is missing at character 6, where there is '1}'$"),
        ("{'a': 1}", "^a name in double quotes is missing at character 2, where there is "),
        ('{\n"a": yes}', "^a value is missing at line 2, character 6, where there is 'yes}'$"),
        ("1 2", "^something follows the value at character 3, where there is '2'$"),
        ('"abc', "^a text begins that has no closing quote, at character 1, "),
        ('"a\\x"', "^a text has a backslash that begins no escape at character 3, "),
        ('"a\tb"', "^a text has a line end or another control character at character 3, "),
        ("\ufeff{}", "^there is a byte order mark at character 1, "),
    ],
)
def test_what_is_none_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        parse_json(text)
    assert not re.search("recursion|sys\\.|Expecting|char \\d", str(refused.value))


def _params(path: Path) -> None:
    read_object(path)


def _samples(path: Path) -> None:
    read_samples(path, lambda before, text: Marked(), lambda turns, tools: Marked(), 8)


def _questions(path: Path) -> None:
    read_questions(str(path), "lines")


def _line(path: Path) -> None:
    read_line(path.read_bytes(), "batch_req_1")


def _prompts(path: Path) -> None:
    read_file(str(path))


def _beside(path: Path) -> None:
    read_json(path)


def _index(path: Path) -> None:
    _weight_map(path)


def _tekken(path: Path) -> None:
    tekken_words(path)


def _session(path: Path) -> None:
    _read(path)


def _folder(path: Path) -> None:
    path.rename(path.with_name("generation_config.json"))
    require_whole(path.parent)


READERS = (_params, _samples, _questions, _line, _prompts, _beside, _index, _tekken, _session, _folder)
TWICE = (
    '{"custom_id": "a", "prompt": "Hi", "text": "a", "prompt": "Bye"}',
    '{"text": "a", "prompt": [{"role": 1, "prompt": 2, "prompt": 2}]}',
)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_stands_twice_is_refused_by_name(tmp_path: Path, read: Callable[[Path], None], text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((FormatError, UsageError, LineError)) as refused:
        read(path)
    told = str(refused.value) or refused.value.args[1]
    assert re.search(r"\w has the key 'prompt' twice in one object", told), told
    assert "not JSON" not in told
    assert "no JSON" not in told


def test_keys_of_several_objects_may_be_the_same() -> None:
    assert parse_json('[{"a": 1, "b": {"a": 2}}, {"a": 3}]') == [{"a": 1, "b": {"a": 2}}, {"a": 3}]


@pytest.mark.parametrize("read", [_params, _samples, _questions, _line])
@pytest.mark.parametrize("text", [DEEP, LONG])
def test_every_reader_of_a_users_file(tmp_path: Path, read: Callable[[Path], None], text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((ParamsError, DataError, LineError, ValueError)) as refused:
        read(path)
    told = str(refused.value) or refused.value.args[1]
    assert "nested too deeply" in told or "thousands of digits" in told, told
    assert not re.search("recursion|sys\\.", told)
