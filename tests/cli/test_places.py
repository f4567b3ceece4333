"""Words in the wrong place: a folder where a text is needed, a text where a folder is, a model where requests are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mistral.batch.lines import EXAMPLE, LineError, read_line
from mistral.formats.folder import BUNDLED
from tests.support.commands import Command, in_process

NEEDED = "it is a folder, and a file is needed"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text("Once upon a time\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "params.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "in.jsonl").write_text(f"{EXAMPLE}\n")
    return in_process(capfd)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("perplexity model empty", f"empty cannot be read: {NEEDED}"),
        ("perplexity story.txt empty", "story.txt is a file, and empty a folder: FOLDER comes before FILE"),
        ("complete model --file empty", f"empty cannot be read: {NEEDED}"),
        ("complete model x --json_schema empty", f"empty cannot be read: {NEEDED}"),
        ("complete model x --instruct --system_file empty", f"empty cannot be read: {NEEDED}"),
        ("interactive model --instruct --system_file empty", f"empty cannot be read: {NEEDED}"),
        ("interactive model --instruct --template a.jinja", "a.jinja cannot be read: No such file or directory"),
        (
            "complete story.txt",
            "story.txt is a file, and neither a folder nor a prompt: < story.txt continues its text, --file story.txt "
            "each of the prompts in it",
        ),
        (
            "complete story.txt empty",
            "story.txt is a file, and empty a folder: FOLDER comes before what is to be continued",
        ),
        ("pack -o empty", f"empty cannot be written: {NEEDED}"),
        ("pack -o story.txt/x", "story.txt/x cannot be written: a part of its path is a file, and no folder"),
        ("mutants --output story.txt", "story.txt cannot be written: it is a file, and a folder is needed"),
        ("batch in.jsonl empty", f"empty cannot be written: {NEEDED}"),
        (
            "batch empty out",
            "empty is a folder: give the files in it as a pattern, as 'empty/*.jsonl'; a",
        ),
        (
            "batch model in.jsonl out",
            "model is the folder of a model: give it as --model model, before or behind INPUT and OUTPUT",
        ),
        ("batch model.gguf in.jsonl out", "model.gguf is a model: give it as --model model.gguf, before or behind"),
        ("batch in.jsonl story.txt", "story.txt line 1 is no answer of a batch ('Once upon a time'): give the output"),
    ],
)
def test_what_is_where_something_else_is_needed(cli: Command, words: str, error: str) -> None:
    assert cli(*words.split()).error.startswith(error)


def test_a_prompt_that_is_also_a_file_is_reported(cli: Command) -> None:
    done = cli("complete", BUNDLED, "story.txt", "-n", 1)
    assert done.code == 0
    assert done.err.splitlines()[0] == (
        "note: story.txt is the prompt, though there is such a file: < story.txt continues its text"
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('"hi"', "a text, 'hi'"),
        ("3", "a number, 3"),
        ("[1, 2]", "a list, [1, 2]"),
        ("true", "a truth value, True"),
        ("null", "null"),
    ],
)
def test_a_line_of_a_batch_that_is_no_object(cli: Command, tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "bare.jsonl").write_text(f"{line}\n")
    error = cli("batch", "bare.jsonl", "out").error
    said = f"line 1: it is {what}, and no object such as {EXAMPLE}"
    assert error == f"bare.jsonl is no file of requests, a JSON object a line: {said}"
    assert read_line(EXAMPLE.encode(), "x").body == json.loads(EXAMPLE)["body"]
    with pytest.raises(LineError, match="and no object such as"):
        read_line(line.encode(), "x")
