"""One way to read text, by whatever door it comes: marks, encodings, line ends; and which words are prompts."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral.cli import prompts
from mistral.formats.folder import BUNDLED
from mistral.tokenizer import Tokenizer
from mistral.util.errors import FormatError
from mistral.util.files import decode_text
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import ROOT, make_folder
from tests.support.tokenizer_json import write_tokenizer

GREEDY = ("--temperature", 0, "--max_tokens", 1)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


def written(text: str, encoding: str) -> bytes:
    marks = {"utf-8-sig": b"", "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    return marks.get(encoding, b"") + text.encode(encoding)


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_of_bytes(encoding: str) -> None:
    text = "é🙂漢\r\nx\n\n"
    assert decode_text(written(text, encoding), "it") == text


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"voil\xe0", "it is not UTF-8 (byte 0xe0)"),
        (codecs.BOM_UTF16_LE + b"a", "it is not UTF-16 (byte 0x61)"),
        (codecs.BOM_UTF8 + b"\xff", "it is not UTF-8 (byte 0xff)"),
    ],
)
def test_bytes_that_are_no_text(data: bytes, said: str) -> None:
    with pytest.raises(FormatError) as error:
        decode_text(data, "it")
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_text_by_every_door(cli: Command, tmp_path: Path, words: Tokenizer, encoding: str) -> None:
    text = "The king\r\nsaid é.\r\n"
    file = tmp_path / "story.txt"
    file.write_bytes(written(text, encoding))
    whole = len(words.encode(text)) - 1
    for done in (cli("perplexity", file, "--json"), cli("perplexity", "--json", stdin=file.read_bytes())):
        facts = json.loads(done.text)
        assert (facts["tokens"], facts["characters"]) == (whole, len(text))
    # A prompt: without the line end that every file has last.
    done = cli("complete", "--json", *GREEDY, stdin=file.read_bytes())
    assert json.loads(done.text)["prompt_tokens"] == words.encode("The king\r\nsaid é.")
    # Lines: a prompt each.
    by_line = [words.encode("The king"), words.encode("said é.")]
    lines = cli("complete", "--file", file, "--json", *GREEDY).text.splitlines()
    assert [json.loads(line)["prompt_tokens"] for line in lines] == by_line
    jsonl = tmp_path / "prompts.jsonl"
    jsonl.write_bytes(written('"The king"\r\n\r\n{"prompt": "said é."}\r\n', encoding))
    for given in (("--file", jsonl), ("--file", "-")):
        lines = cli("complete", *given, "--json", *GREEDY, stdin=jsonl.read_bytes()).text.splitlines()
        assert [json.loads(line)["prompt_tokens"] for line in lines] == by_line
    shown = cli("interactive", *GREEDY, stdin=file.read_bytes()).text.splitlines()
    assert shown[0].startswith("The king")
    assert shown[1].startswith("said é.")


def test_characters_that_no_token_predicts_do_not_count(cli: Command, tmp_path: Path) -> None:
    """Where a tokenizer puts no bos in front, nothing predicts the first token."""
    folder = make_folder(tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    write_tokenizer(folder, "byte level", tmp_path)
    text = "The old woman and the goose"
    words = Tokenizer(folder / "tokenizer.json")
    ids = words.encode(text)
    assert ids[0] != words.bos_id
    facts = json.loads(cli("perplexity", folder, "--json", stdin=text).text)
    assert (facts["tokens"], facts["characters"]) == (len(ids) - 1, len(text) - len(words.decode(ids[:1])))


def test_plain_text_in_a_file_of_another_name_is_one_clear_error(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("The king\n")
    error = cli("complete", "--file", file).error
    assert f"{file} line 1 is not JSON" in error
    assert error.endswith("plain text, a prompt a line, must be in a file whose name ends in .txt")


def test_perplexity_without_text_is_refused_before_anything_is_loaded(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral.cli.evaluate.open_model", None)
        assert cli("perplexity", stdin="").error == "no text: give a file, or text on stdin"
        assert cli("perplexity", tmp_path / "empty.txt").error == f"no text: {tmp_path}/empty.txt is empty"
        assert cli("perplexity", "nowhere.txt").error == "nowhere.txt cannot be read: No such file or directory"


def process(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "main", *words]
    return subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **how)


def test_a_word_with_a_slash_is_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    done = process("complete", "and/or", "-n", "1", "-t", "0", stdin=subprocess.DEVNULL)
    assert (done.returncode, len(done.stdout) > 0) == (0, True), done.stderr
    assert "note: there is no folder 'and/or' here, so it is the prompt" in done.stderr
    monkeypatch.setattr("mistral.cli.waiting.stdin_may_have_data", lambda: False)
    monkeypatch.setattr("mistral.cli.waiting.stdin_has_data", lambda: False)
    for word in ("w/o", "either/or/both"):
        assert prompts.folder_or_prompt(word) == "prompt"


def test_a_word_with_a_slash_is_a_hub_id_where_stdin_brings_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    for waits, meant in ((True, "folder"), (False, "prompt")):
        monkeypatch.setattr("mistral.cli.waiting.stdin_may_have_data", lambda waits=waits: waits)
        monkeypatch.setattr("mistral.cli.waiting.stdin_has_data", lambda: False)
        assert prompts.folder_or_prompt("mistralai/Mistral-7B-v0.1") == meant
        assert prompts.folder_or_text("mistralai/Mistral-7B-v0.1") == ("folder" if waits else "file")
    for path in ("./x", "/x/y", "~/x", "x/"):
        assert prompts.folder_or_prompt(path) == "folder"


def test_an_open_pipe_may_still_bring_text() -> None:
    code = "from mistral.cli.waiting import stdin_may_have_data as f; print(f())"
    for close, want in ((False, "True\n"), (True, "False\n")):
        read, write = os.pipe()
        if close:
            os.close(write)
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], stdin=read, capture_output=True, text=True, cwd=ROOT, timeout=60
            )
        finally:
            os.close(read)
            if not close:
                os.close(write)
        assert done.stdout == want, done.stderr


def test_a_question_of_several_lines_over_a_pipe(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny", sliding_window=None)
    kept = tmp_path / "chat.json"
    done = cli("interactive", folder, "--instruct", *GREEDY, stdin=f'"""two\nlines"""\n"""one"""\n/save {kept}\n')
    assert done.code == 0, done.err
    asked = [m["content"] for m in json.loads(kept.read_text())["messages"] if m["role"] == "user"]
    assert asked == ["two\nlines", "one"]
    assert cli("interactive", folder, "--instruct", *GREEDY, stdin='"""never\nclosed').err.endswith(
        'error: the text that began with """ does not end with """\n'
    )


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_end_lines_and_are_said_where_they_are_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], end: str
) -> None:
    file = tmp_path / "story.txt"
    file.write_bytes(f"The king{end}The wolf{end}".encode())
    assert prompts.read_text(str(file)) == f"The king{end}The wolf{end}"
    assert "carriage returns" in capfd.readouterr().err
    assert [line.prompt for line in prompts.read_file(str(file))] == ["The king", "The wolf"]
    file.write_bytes(b"The king\n")
    assert prompts.read_text(str(file)) == "The king\n"
    assert not capfd.readouterr().err


@pytest.mark.parametrize(("text", "noted"), [("The king\r\n", False), ("The\r\nking\r\n", True), ("The king\n", False)])
def test_a_line_end_that_is_no_part_of_the_prompt_is_not_called_one(cli: Command, text: str, noted: bool) -> None:
    assert ("carriage returns" in cli("complete", "--max_tokens", 1, stdin=text).err) is noted


BROKEN = """
import os, sys
os.{how}
from mistral.cli import main
sys.exit(main(["complete", "The king", "-n3", "-t", "0"]))
"""


def run_with(how: str) -> subprocess.CompletedProcess[str]:
    code = BROKEN.format(how=how)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=ENVIRONMENT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_text_comes_also_where_notes_cannot_be_written() -> None:
    done = run_with("dup2(os.open('/dev/full', os.O_WRONLY), 2)")
    assert (done.returncode, done.stdout) == (0, " was very angry\n")


def test_a_closed_stdout_is_an_error() -> None:
    command = ["sh", "-c", f"exec {sys.executable} -m main --version >&-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 2
    assert "stdout is closed" in done.stderr
