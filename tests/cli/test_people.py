"""What people meet at a terminal: escape sequences, --quiet, names for defaults, questions in one shot, Ctrl-C."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.cli import main, prompts, terminal
from mistral.cli.commands import COMMANDS
from mistral.cli.interrupts import keeping_interrupts
from mistral.cli.terminal import visible
from mistral.tokenizer import Tokenizer
from tests.support.commands import ENVIRONMENT, PATIENCE, Command, in_process
from tests.support.folders import BUNDLED, ROOT, make_folder, make_parrot

pexpect = pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("no pseudo-terminals on Windows", allow_module_level=True)
SHORT = ("--max_tokens", 5, "--temperature", 0)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", sliding_window=None)


# --- escape sequences


def test_control_characters_are_spelled_out() -> None:
    assert visible("a\x1b[31mb\x07\x9b\r\u202e") == "a\\x1b[31mb\\x07\\x9b\\r\\u202e"
    for text in ("two\nlines\tand a tab", "é🙂漢 👩\u200d👩", ""):
        assert visible(text) == text


def test_escapes_of_a_model_are_shown_at_a_terminal_and_piped_as_they_are(cli: Command, tmp_path: Path) -> None:
    parrot = make_parrot(tmp_path / "parrot", "\x1b[2JX")
    words = ["complete", parrot, "go \x1b[5m", "-n", 5, "-t", 0]
    assert cli(*words).out == "\x1b[2JX\n"
    child = pexpect.spawn(
        sys.executable,
        ["-m", "main", *map(str, words)],
        cwd=str(ROOT),
        env=ENVIRONMENT,
        timeout=PATIENCE,
        encoding="utf-8",
    )
    child.expect(pexpect.EOF)
    assert "\\x1b[2JX" in child.before
    assert "\x1b[2J" not in child.before


def test_escapes_in_names_and_words_never_reach_a_terminal(cli: Command, tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[31mb"
    for done in (cli("demo", evil), cli("complete", "x", "--file", evil), cli("\x1b[31m")):
        assert done.code == 2
        assert "\x1b" not in done.err
    make_folder(evil)
    assert "\x1b" not in cli("complete", evil, "Hello", *SHORT).err


def test_colours_are_for_terminals_without_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.has_colour(Stream(True))
    assert not terminal.has_colour(Stream(False))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.has_colour(Stream(True))
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.has_colour(Stream(True))


# --- flags and names


def test_quiet_and_verbose(cli: Command, folder: Path) -> None:
    words = ("complete", folder, "Hello", *SHORT)
    loud, quiet = cli(*words), cli(*words, "--quiet")
    assert (quiet.out, quiet.err) == (loud.out, "")
    log = logging.getLogger("mistral")
    with terminal.quietly(True):
        assert not log.isEnabledFor(logging.WARNING)
    assert log.isEnabledFor(logging.WARNING)
    missing = folder / "nowhere"
    assert cli("demo", missing, "--quiet").error == f"no such folder: {missing}"
    told = cli("demo", missing, "--verbose").err
    assert told.startswith(f"error: no such folder: {missing}\nTraceback")
    assert cli("demo", "--quiet", "--verbose").error == "--quiet and --verbose: give one of them"
    assert cli("complete", folder, *SHORT, "--", "--quiet").err.startswith("loaded ")  # a prompt, not a flag
    assert cli("complete", "x", "--quiet=yes").error == "--quiet is a switch: give it no value"
    assert cli("complete", "x", "--quite").error.startswith("no flag --quite; did you mean --quiet?")


def test_short_flags(cli: Command, folder: Path) -> None:
    long = cli("complete", folder, "Hello", "--max_tokens", 7, "--temperature", 1.5, "--seed", 3).text
    assert cli("complete", folder, "Hello", "-n", 7, "-t", "1.5", "-s", 3).text == long
    assert cli("complete", folder, "Hello", "-n=7", "-t=1.5", "-s=3").text == long
    assert cli("complete", folder, "Hello", "-n", "x").error == "--max_tokens must be a whole number, not 'x'"


def test_a_default_folder(cli: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_MODEL", str(folder))
    done = cli("complete", "Hello", *SHORT)
    assert done.err.splitlines()[-2].startswith(f"loaded MISTRAL_MODEL, {folder}: ")
    assert done.text == cli("complete", folder, "Hello", *SHORT).text
    assert str(folder) in cli("inspect").text
    assert cli("mutants").code == 0
    assert cli("trace", "--plan", "3").code == 0
    monkeypatch.setenv("MISTRAL_MODEL", "")
    assert "the bundled model" in cli("complete", "Hello", *SHORT).err


@pytest.mark.parametrize("words", [("inspect",), ("complete", "Hello"), ("finetune", "--data", "x", "--out", "y")])
def test_a_default_folder_that_is_not_there(cli: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str]) -> None:
    monkeypatch.setenv("MISTRAL_MODEL", "/tmp/nowhere")
    said = "no such folder: /tmp/nowhere, which the variable MISTRAL_MODEL names: mend it, or unset it"
    assert cli(*words).err.splitlines()[-1] == f"error: {said}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kernels=false",), "no flag --kernels: use --execution kernels, or --execution eager for --kernels=false"),
        (("--execution", "fast"), "--execution 'fast' is not one of auto, eager, kernels, cuda_graph, bitwise"),
        (("--deterministic", "--execution", "eager"), "--execution is given as bitwise and as eager"),
        (("--execution", "eager", "--deterministic"), "--execution is given as eager and as bitwise"),
        (("--deterministic", "--deterministic"), "--deterministic is given twice"),
        (("--deterministic", "--dtype", "bfloat16"), "execution bitwise is for a CPU in float32"),
        (("--logit_bias", "5"), "--logit_bias must be ID:NUMBER, such as 42:-100, not '5'"),
        (("--logit_bias", '{"5": 1}'), """--logit_bias must be ID:NUMBER, such as 42:-100, not '{"5": 1}'"""),
        (("--logit_bias", "5:x"), "--logit_bias must be ID:NUMBER, such as 42:-100, not '5:x'"),
        (("--logit_bias", "5:999"), "logit_bias of 5 is 999"),
    ],
)
def test_flags_of_how_it_runs(cli: Command, folder: Path, words: tuple[str, ...], said: str) -> None:
    assert said in cli("complete", folder, "Hello", *words).error


def test_deterministic_is_short_for_bitwise(cli: Command, folder: Path) -> None:
    short = cli("complete", folder, "Hello", *SHORT, "--deterministic")
    assert "; bitwise;" in short.err
    assert short.text == cli("complete", folder, "Hello", *SHORT, "--execution", "bitwise").text
    assert "bitwise" not in cli("complete", folder, "Hello", *SHORT, "--deterministic=false").err


def test_biases_and_several_samples(cli: Command, folder: Path) -> None:
    words = ("complete", folder, "Hello", "--json", "-n", 3)
    (first,) = cli(*words, "-t", 0).text.splitlines()
    (token, *_) = json.loads(first)["tokens"]
    (other,) = cli(*words, "-t", 0, "--logit_bias", f"{token}:-100").text.splitlines()
    assert token not in json.loads(other)["tokens"]
    several = [json.loads(line) for line in cli(*words, "--n", 3, "-t", 2, "-s", 1).text.splitlines()]
    assert [(each["index"], each["sample"]) for each in several] == [(0, 0), (0, 1), (0, 2)]
    assert len({tuple(each["tokens"]) for each in several}) == 3
    texts = cli("complete", folder, "Hello", "-n", 3, "--n", 3, "-t", 2, "-s", 1).text
    assert texts == "".join(f"{each['text']}\n{'=' * 21}\n" for each in several)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_a_shell(cli: Command, tmp_path: Path, shell: str) -> None:
    text = cli("completion", shell).text
    assert all(name in text for name in COMMANDS)
    assert "max_tokens" in text
    if shutil.which(shell) is None:
        return
    (tmp_path / "script").write_text(text)
    check = "fish --no-execute" if shell == "fish" else f"{shell} -n"
    assert subprocess.run([*check.split(), str(tmp_path / "script")], capture_output=True).returncode == 0
    if shell == "bash":
        ask = f"source {tmp_path}/script; COMP_WORDS=(mistral-ref $1 $2); COMP_CWORD=$3; _mistral_ref; "
        ask += "echo ${COMPREPLY[@]}"
        for words, want in (
            (("com", "", "1"), "complete compare completion"),
            (("complete", "--top_", "2"), "--top_p"),
        ):
            done = subprocess.run(["bash", "-c", ask, "x", *words], capture_output=True, text=True, check=True)
            assert set(want.split()) <= set(done.stdout.split())


def test_no_script_for_another_shell(cli: Command) -> None:
    assert cli("completion", "tcsh").error == "no script for the shell 'tcsh': bash, zsh and fish have one"


# --- questions


def test_a_question_in_one_shot(cli: Command, folder: Path, tmp_path: Path) -> None:
    template = find_template(Tokenizer(BUNDLED / "tokenizer.model"))

    def encoded(system: str, question: str) -> list[int]:
        return template.encode_chat([Message("system", system), Message("user", question)])

    words = ("complete", folder, "--instruct", "--json", *SHORT)
    ids = encoded("Be brief.", "Who?")
    assert json.loads(cli(*words, "Who?", "--system", "Be brief.").text)["prompt_tokens"] == ids
    file = tmp_path / "questions.txt"
    file.write_text("Who?\nWhere?\n")
    found = [json.loads(line)["prompt_tokens"] for line in cli(*words, "--file", file).text.splitlines()]
    assert found == [encoded("", q) for q in ("Who?", "Where?")]
    (tmp_path / "ids.jsonl").write_text("[1, 2]\n")
    for more, said in (
        (("--file", tmp_path / "ids.jsonl"), "--instruct takes questions: each prompt must be text"),
        (("a", "--suffix", "b"), "--suffix and --instruct: give one of them"),
    ):
        assert said in cli(*words, *more).error
    assert "add --instruct" in cli("complete", folder, "Who?", "--system", "x").error


def test_a_note_where_raw_text_goes_to_an_instruct_model(cli: Command, folder: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "Tiny-Instruct-v1"
    shutil.copytree(folder, tuned)
    note = "note: this is an instruct model, and the prompt is continued as raw text: see --instruct"
    assert note in cli("complete", tuned, "Hello", *SHORT).err.splitlines()
    assert note in cli("interactive", tuned, *SHORT, stdin="Hello\n").err.splitlines()
    assert note not in cli("complete", tuned, "Hello", "--instruct", *SHORT).err
    assert note not in cli("complete", folder, "Hello", *SHORT).err
    (tmp_path / "plain").mkdir()
    for content, want in (('{"chat_template": "x"}', True), ("{}", False), ("[", False)):
        (tmp_path / "plain" / "tokenizer_config.json").write_text(content)
        assert prompts.is_instruct(tmp_path / "plain") == want


def test_raw_prompts_have_help_and_quit(cli: Command, folder: Path) -> None:
    done = cli("interactive", folder, *SHORT, stdin="/help\nHello\n/usr is\n/quit\nnever read\n")
    assert [line[:5] for line in done.text.splitlines()] == ["Hello", "/usr "]
    assert "/quit or Ctrl-D leaves" in done.err


def test_retry_and_continue(cli: Command, folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "chat.json"
    chat = ("interactive", folder, "--instruct", "-t", 0, "-n", 4)
    done = cli(*chat, stdin=f"Hi\n/continue\n/save {kept}\n/retry\n")
    assert done.code == 0, done.err
    first, more, again, _ = done.text.split("\n")
    assert again == first
    assert json.loads(kept.read_text())["messages"][-1]["content"] == first + more
    whole = cli("interactive", folder, "--instruct", "-t", 0, "-n", 8, stdin="Hi\n").text
    assert whole == first + more + "\n"
    for line in ("/retry", "/continue"):
        assert cli(*chat, stdin=f"{line}\n").err.splitlines()[-1].startswith("error: there is n")


def test_set_and_show(cli: Command, folder: Path) -> None:
    chat = ("interactive", folder, "--instruct", "-t", 0, "-n", 4, "-s", 5)
    done = cli(*chat, stdin="/set max_tokens 2\nHi\n/set stop x\n/set stop -\n/set seed 7\n/show\n")
    assert done.code == 0, done.err
    assert "[2 tokens" in done.err
    shown = done.err.splitlines()
    assert "max_tokens 2, temperature 0, top_p 0.8, seed 5" in [line.replace("0.0", "0") for line in shown]
    assert any("stop x" in line for line in shown)
    assert shown[-2] == "> Hi"
    assert "seed 7" in shown[-4]
    for line, said in (
        ("/set", "/set needs a name and a value: max_tokens, temperature"),
        ("/set top_q 1", "/set knows no 'top_q'; did you mean top_p?"),
        ("/set top_p 7", "top_p is 7.0; it must be at most 1"),
        ("/set max_tokens x", "max_tokens must be a whole number, not 'x'"),
    ):
        assert said in cli(*chat, stdin=f"{line}\n").err.splitlines()[-1]


def at_terminal(*words: object, **environment: str) -> Any:
    arguments = ["-m", "main", *map(str, words)]
    env = {**ENVIRONMENT, "TERM": "dumb", **environment}
    return pexpect.spawn(sys.executable, arguments, cwd=str(ROOT), env=env, timeout=PATIENCE, encoding="utf-8")


@pytest.mark.long
def test_replacing_a_file_is_confirmed_at_a_terminal(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "chat.json"
    child = at_terminal("interactive", folder, "--instruct", *SHORT)
    child.expect("> ")
    for question, answer, said in (("Hi", None, "saved 1 turn"), ("Bye", "n", "not saved"), ("", "y", "saved 2 turns")):
        if question:
            child.sendline(question)
            child.expect(r"prefilled.*\]")
        child.sendline(f"/save {kept}")
        if answer:
            child.expect(r"exists: replace it\? \[y/N\]")
            child.sendline(answer)
        child.expect(said)
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    assert len(json.loads(kept.read_text())["messages"]) == 4


@pytest.mark.long
def test_lines_of_earlier_sessions_come_back(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    modern = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path), "NO_COLOR": "1"}
    for keys, expected in (("What was typed\r", "first after"), ("\x1b[A\r", "What was typed")):
        child = at_terminal("interactive", folder, *SHORT, **modern)
        child.expect(r"\x1b\[\?2004h")
        child.send(keys)
        child.expect(expected)
        child.expect(r"\x1b\[\?2004h")
        child.send("\x04")
        child.expect(pexpect.EOF)
    history = tmp_path / "mistral-ref" / "history"
    assert history.stat().st_mode & 0o777 == 0o600


# --- Ctrl-C


@pytest.mark.parametrize("module", ["main", "mistral"])
@pytest.mark.parametrize("wait", [0.15, 0.35, 0.7])
def test_ctrl_c_during_the_imports_is_quiet(module: str, wait: float) -> None:
    words = [sys.executable, "-m", module, "complete", "Once upon", "-n", "1000000", "--stop", "never such a text"]
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        time.sleep(wait)
        child.send_signal(signal.SIGINT)
        err = child.communicate(timeout=PATIENCE)[1].decode()
    err = err.replace(str(ROOT), "").replace(sys.prefix, "")  # whose names may have the word that is looked for
    # Before the first line of this project ran, the interpreter itself answers, and begins late on a busy machine.
    by_python = child.returncode < 0 or "init_import_site" in err or "Could not import runpy" in err
    assert child.returncode == 130 or (by_python and "mistral" not in err), err
    assert "mistral/" not in err.partition("loaded")[0]


def test_a_ctrl_c_that_was_swallowed_is_raised_later() -> None:
    with pytest.raises(KeyboardInterrupt), keeping_interrupts():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_python_m_mistral() -> None:
    for module in ("main", "mistral"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_turns_ctrl_c_into_its_own_error_is_quiet_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(words: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("initialization failed") from interrupt

    monkeypatch.setattr("mistral.cli.run.run", importing)
    assert main(["demo"]) == 130
    monkeypatch.setattr("mistral.cli.run.run", lambda words: [][1])
    with pytest.raises(IndexError):
        main(["demo"])


def test_a_start_that_takes_long_says_so_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral.cli import starting

    class Timer(threading.Timer):
        def start(self) -> None:
            timers.append(self)
            super().start()

    monkeypatch.setattr(threading, "Timer", Timer)
    for screen, patience, told in ((True, 0.05, ["starting it .."]), (True, 600, []), (False, 0.05, [])):
        timers: list[threading.Timer] = []
        said: list[str] = []
        monkeypatch.setattr(starting, "PATIENCE", patience)
        monkeypatch.setattr(starting, "echo_err", said.append)
        monkeypatch.setattr("sys.stderr", mock.Mock(isatty=lambda screen=screen: screen))
        with starting.starting("starting it"):
            assert len(timers) == screen
            if told:
                timers[0].join(PATIENCE)
        for timer in timers:
            timer.join(PATIENCE)  # cancelled, it ends at once
            assert not timer.is_alive()
        assert said == told
