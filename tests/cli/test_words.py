"""What a message says to somebody who has mistyped: what is there, which file and line, and what to type instead."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from mistral.cli import main
from mistral.cli.commands import COMMANDS
from mistral.fast.kernels import _reason
from mistral.formats.hub import is_hub_id
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("words") / "tiny")


# --- what is not there


def test_a_path_of_a_file_is_no_id_of_the_hub(cli: Command) -> None:
    assert not any(is_hub_id(f"nowhere/model.{end}") for end in ("gguf", "safetensors", "pth", "jsonl"))
    assert is_hub_id("owner/model-GGUF")
    for command in (("complete", "nowhere/model.gguf", "x"), ("inspect", "nowhere/model.gguf")):
        assert cli(*command).error == "no such file: nowhere/model.gguf"


def test_a_file_that_is_no_model_is_called_so(cli: Command, tmp_path: Path) -> None:
    picture, empty = tmp_path / "pic.png", tmp_path / "empty.gguf"
    picture.write_bytes(PNG)
    empty.touch()
    for command in (("inspect", picture), ("convert", picture, tmp_path / "out", "--to", "hf")):
        assert cli(*command).error.startswith(f"{picture} is no model: that is a folder with params.json or")
    assert cli("inspect", empty).error == f"{empty} is not a complete GGUF file: it is empty"


def test_words_that_were_meant_otherwise(cli: Command, folder: Path) -> None:
    two = "no such folder: a (of two words the first is the folder, and the second, 'maybe', the prompt)"
    assert cli("complete", "a", "--json", "maybe", "-n", 3).error == two
    assert cli("trace", "a", "maybe", "-o", "x").error == two
    behind = cli("complete", "--", "-5 degrees", "-n", "3").error
    assert behind == "unexpected argument '3' (-n is behind --: flags go before it)"
    assert "quote a prompt that contains spaces" in cli("complete", folder, "a", "b").error
    with mock.patch("mistral.cli.waiting.stdin_has_data", return_value=True):
        assert cli("complete", "prompt").error == (
            "no such folder: prompt, in which to continue the text on stdin; if prompt is the prompt, add < /dev/null"
        )


# --- which line


def test_messages_about_a_file_name_its_line(cli: Command, folder: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.jsonl"
    ids.write_text('"Hello"\n\n[1, 99999]\n')
    want = f"{ids} line 3 has the id 99999, outside the vocabulary of 4096"
    assert cli("complete", folder, "--file", ids).error == want
    assert cli("trace", folder, "--file", ids, "-o", tmp_path / "x.safetensors").error == want
    plain = cli("complete", folder, "--file", "-", stdin="Hello there\n").error
    assert plain.startswith("stdin line 1 is not JSON")
    assert plain.endswith("without --file, all of stdin is one prompt")
    assert cli("complete", folder, "--file", "-", stdin="\n").error.startswith("no prompts in stdin")
    zeros = tmp_path / "pic.txt"
    zeros.write_bytes(PNG)
    assert "it has zero bytes too, so it is no text" in cli("complete", folder, "--file", zeros).error


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--seed", "9" * 23, "it must be at most 2**63 - 1"),
        ("--seed", "-" + "9" * 23, "it must be at least -(2**63 - 1)"),
        ("--temperature", "nan", "--temperature is nan; it must be a finite number"),
        ("--temperature", "inf", "--temperature is inf; it must be a finite number"),
        ("--top_p", "1.5", "--top_p is 1.5; it must be at most 1"),
    ],
)
def test_limits_are_written_as_somebody_would(cli: Command, flag: str, value: str, said: str) -> None:
    assert said in cli("complete", "x", flag, value).error


def test_limits_of_training(cli: Command) -> None:
    words = ("finetune", "--data", "x", "--out", "y")
    assert cli(*words, "--steps", 10**12).error.endswith("it must be at most 2,147,483,647")
    assert cli(*words, "--lr", "nan").error == "--lr is nan; it must be a finite number"


# --- a conversation


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/set temperatures 0.5", "/set knows no 'temperatures'; did you mean temperature?"),
        ("/set temperature", "/set needs a value for temperature"),
        ("/set logit_bias 999999:3", "logit_bias has the id 999999, outside the vocabulary of 4096"),
        ("/set logit_bias 3:300", "logit_bias of 3 is 300.0; it must be at most 100"),
        ("/set reasoning_effort high", "reasoning_effort is 'high'; template v1 has no place for one: leave it out"),
        ("/retri", "no command /retri; did you mean /retry?; // begins a question with a slash"),
        ("/retry", "there is no question to answer again"),
        ("/continue", "there is no answer to go on with"),
    ],
)
def test_commands_of_a_conversation(cli: Command, folder: Path, line: str, error: str) -> None:
    done = cli("interactive", folder, "--instruct", stdin=f"{line}\n")
    assert done.err.splitlines()[-1] == f"error: {error}"


@pytest.mark.parametrize("more", [(), ("--instruct",)])
def test_a_bias_on_a_token_that_is_not_there_is_refused_before_any_question(
    cli: Command, folder: Path, more: tuple[str, ...]
) -> None:
    done = cli("interactive", folder, *more, "--logit_bias", "999999:3")
    assert done.err.splitlines()[-1] == "error: logit_bias has the id 999999, outside the vocabulary of 4096"
    assert done.code == 2


def test_thoughts_of_a_model_without_any(cli: Command, folder: Path) -> None:
    done = cli("interactive", folder, "--instruct", stdin="/set thinking hide\n")
    assert "note: this template knows no thoughts, so there is nothing to show or hide" in done.err.splitlines()


def test_an_answer_that_is_complete_is_said_to_be(cli: Command, folder: Path) -> None:
    def ended(self: object, progress: object = None) -> list[object]:
        return []

    with mock.patch("mistral.chat.conversation.Chat.resume", ended):
        done = cli("interactive", folder, "--instruct", "-n", 1, "-t", 0, stdin="Hi\n/continue\n")
    assert done.code == 0
    assert any(line.startswith("[1 token;") for line in done.err.splitlines())
    assert done.err.splitlines()[-1] == "note: nothing was added: the model takes this answer for complete"


def test_a_model_is_identified_once_in_a_conversation(cli: Command, folder: Path, tmp_path: Path) -> None:
    """It is read again for that, which takes a second and more where a file is large."""
    with mock.patch("mistral.formats.fingerprint.fingerprint", return_value="it") as identify:
        lines = f"/save {tmp_path}/a.json\n/save {tmp_path}/b.json\n/load {tmp_path}/a.json\n"
        assert cli("interactive", folder, "--instruct", stdin=lines).code == 0
    assert identify.call_count == 1


# --- the system


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("words", [("--version",), ("--help",), ("completion", "bash")])
def test_a_full_disk_behind_stdout_is_named(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, mock.patch.object(sys, "stdout", full):
        assert main(words) == 2
    assert capfd.readouterr().err == "error: stdout cannot be written: No space left on device\n"


def test_an_error_of_the_system_is_put_into_words(cli: Command, folder: Path) -> None:
    with mock.patch(
        "mistral.formats.inspect_adapter.is_one", side_effect=PermissionError(13, "Permission denied", "/x")
    ):
        assert cli("inspect", folder).error == "/x cannot be read or written: Permission denied"


def test_why_a_compiler_failed() -> None:
    full = "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status\n"
    assert _reason(full) == "/usr/bin/ld: final link failed: No space left on device"
    assert _reason("a.c:1:2: error: expected ';'\n") == "a.c:1:2: error: expected ';'"
    assert _reason("collect2: error: ld returned 1 exit status") == "collect2: error: ld returned 1 exit status"
    assert _reason("") == ""


# --- help


def test_completion_offers_what_help_lists(cli: Command) -> None:
    for shell, mark in (("bash", "--"), ("fish", "-l ")):
        text = cli("completion", shell).text
        (line,) = [x for x in text.splitlines() if x.strip().startswith("complete)")] if shell == "bash" else [text]
        assert f"{mark}deterministic" in line
        assert f"{mark}quiet" in line
        assert f"{mark}folder" not in line
    assert "flags:" not in cli("completion", "--help").text


def test_help_tells_two_flags_of_one_letter_apart(cli: Command) -> None:
    text = cli("complete", "--help").text
    (line,) = [line for line in text.splitlines() if line.startswith("  --n ")]
    assert line.endswith("(int, default: 1, -n is --max_tokens)") or line.endswith(
        "(int, -n is --max_tokens, default: 1)"
    )
    told = [line for name in COMMANDS for line in cli(name, "--help").text.splitlines() if "may be repeated" in line]
    assert len(told) > 5
    assert all(line.count("may be repeated") == 1 for line in told)


def test_finetune_at_a_narrow_terminal_keeps_the_loss() -> None:
    from mistral.cli.finetune import _Line
    from mistral.train.loop import Report

    with mock.patch("sys.stderr", io.StringIO()) as err, mock.patch.dict(os.environ, {"COLUMNS": "50"}):
        err.isatty = lambda: True  # type: ignore[method-assign]
        line = _Line()
        line.report(Report(3, 200, 1.25, None, 950.0, 9.0))
        line.end()
        line.__exit__()
    assert "step 3/200, loss 1.250, 950 tokens/s" in err.getvalue()
    assert line.step == 3


@pytest.mark.parametrize("hits", [1, 2])
def test_ctrl_c_while_training_says_what_was_saved(cli: Command, tmp_path: Path, hits: int) -> None:
    from mistral.train.loop import Report

    def run(*_: object, on_report: Callable[[Report], None], should_stop: Callable[[], bool], **__: object) -> None:
        on_report(Report(3, 200, 1.25, None, 950.0, 9.0))
        for _ in range(hits):
            signal.raise_signal(signal.SIGINT)
        assert should_stop()
        raise KeyboardInterrupt  # as the loop does, once it has saved

    with mock.patch("mistral.train.run.finetune", run):
        done = cli("finetune", "--data", "x", "--out", tmp_path)
    assert done.code == 130
    saved = f"saved after step 3 in {tmp_path}; the same command with --resume goes on from there"
    assert (saved in done.err.splitlines()) == (hits == 1)
