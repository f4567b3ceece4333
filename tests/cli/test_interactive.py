"""`interactive` under a pseudo-terminal, as a person has it, and with piped input."""

from __future__ import annotations

import codecs
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral.cli import terminal
from tests.support.commands import ENVIRONMENT, PATIENCE, Command, in_process
from tests.support.folders import ROOT, make_folder, make_parrot

pexpect = pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("no pseudo-terminals on Windows", allow_module_level=True)

PARROT = "é🙂漢"
ASK = "Prompt: "


class Terminal:
    """A command on a pseudo-terminal. What it writes is decoded as strict UTF-8 as it arrives, and kept in pieces."""

    def __init__(self, *words: object) -> None:
        arguments = ["-m", "main", *map(str, words)]
        self.child = pexpect.spawn(
            sys.executable, arguments, cwd=str(ROOT), env={**ENVIRONMENT, "TERM": "dumb"}, timeout=PATIENCE, echo=True
        )
        self.child.delaybeforesend = None
        self.decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self.pieces: list[str] = []
        self.seen = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces).replace("\r\n", "\n")

    def more(self, patience: float = PATIENCE) -> None:
        """Wait for something more to be written."""
        self.pieces.append(self.decoder.decode(self.child.read_nonblocking(4096, timeout=patience)))

    def until(self, pattern: str, patience: float = PATIENCE) -> str:
        """What is written from where the last call ended until the pattern matches."""
        while not (match := re.compile(pattern).search(self.text, self.seen)):
            try:
                self.more(patience)
            except pexpect.EOF:
                raise AssertionError(f"ended before {pattern!r}: {self.text!r}") from None
        begin, self.seen = self.seen, match.end()
        return self.text[begin : match.end()]

    def interrupt_line(self) -> str:
        """Ctrl-C at the prompt, and what is written until there is a new one."""
        for _ in range(20):
            self.child.sendintr()
            try:
                return self.until(ASK, patience=5)
            except pexpect.TIMEOUT:
                pass  # CPython's input() misses a signal that comes just before it begins to wait
        raise AssertionError(f"no new prompt after Ctrl-C: {self.text[self.seen :]!r}")

    def end(self) -> int:
        """Read to the end; the exit code."""
        try:
            while True:
                self.more()
        except pexpect.EOF:
            self.decoder.decode(b"", final=True)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parrot(tmp_path_factory.mktemp("folders") / "parrot", PARROT)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def session(parrot: Path) -> Iterator[Terminal]:
    """One session that answers at length, shared, because each costs an import of torch; it is left as found."""
    terminal = Terminal("interactive", parrot, "--max_tokens", 10**6, "--temperature", 0)
    loaded = terminal.until(ASK).removeprefix("loading PyTorch and the model ..\n")  # on a busy machine
    assert loaded.startswith(f"loaded {parrot}: ")
    _, how_to_leave, _ = loaded.split("\n")
    assert how_to_leave.endswith("/quit or Ctrl-D leaves.")
    yield terminal
    terminal.child.close(force=True)


STATS = r"\[(\d+) tokens, [\d.]+ tokens/s; first after [\d.]+ s; (\w+)\]\n"


def interrupt_after(terminal: Terminal, prompt: str, pattern: str) -> str:
    """Type a prompt, Ctrl-C once the pattern has appeared; return all up to the next prompt."""
    terminal.child.sendline(prompt)
    text = terminal.until(pattern)
    terminal.child.sendintr()
    return text + terminal.until(STATS) + terminal.until(ASK)


def test_text_appears_as_it_is_made_and_ctrl_c_stops_the_answer(session: Terminal) -> None:
    for _ in range(10):
        before = len(session.pieces)
        text = interrupt_after(session, "go on", f"(?:{PARROT}){{20}}")
        if len(session.pieces) - before > 5:
            break  # else this process was kept from reading, and found several pieces as one
    # It cannot have been finished: a million tokens were asked for.
    said = text.replace("^C", "")  # the terminal's echo may stand anywhere in what was still being written
    match = re.fullmatch(rf"go on\ngo on((?:{PARROT})+é?🙂?)\n{STATS}{ASK}", said)
    assert match, text
    assert (match[3], int(match[2]) < 10**6) == ("interrupted", True)
    assert len(session.pieces) - before > 5  # in pieces
    assert "\ufffd" not in text
    # The next prompt works.
    assert f"again{PARROT}{PARROT}" in interrupt_after(session, "again", f"again\nagain(?:{PARROT}){{2}}")


def test_multi_byte_text_typed_in(session: Terminal) -> None:
    text = interrupt_after(session, "é 🙂 漢", f"\n.*(?:{PARROT}){{3}}")
    assert text.startswith(f"é 🙂 漢\né 🙂 漢{PARROT}{PARROT}{PARROT}")
    assert "\ufffd" not in session.text


def test_ctrl_c_at_the_prompt_drops_the_line(session: Terminal) -> None:
    for typed in ("", "never mind"):
        session.child.send(typed)
        session.until(re.escape(typed))
        assert "error" not in session.interrupt_line()
    assert interrupt_after(session, "still here", rf"{PARROT}").startswith(f"still here\nstill here{PARROT}")


def test_an_empty_line_asks_again(session: Terminal) -> None:
    session.child.sendline("  ")
    assert "tokens" not in session.until(ASK)


def test_a_line_that_is_not_utf8_is_refused_and_the_session_goes_on(session: Terminal) -> None:
    decode, session.decoder = session.decoder, codecs.getincrementaldecoder("utf-8")("replace")  # the echo of it
    session.child.sendline(b"voil\xff!")
    text = session.until(rf"error: .*\n.*{ASK}")
    session.decoder = decode
    assert "error: the line is not UTF-8 (byte 0xff): convert it first" in text
    assert interrupt_after(session, "and on", PARROT).startswith(f"and on\nand on{PARROT}")


def test_a_prompt_that_does_not_fit_is_refused_and_ctrl_d_leaves(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "full", sliding_window=None)
    terminal = Terminal("interactive", folder, "--max_tokens", 10**15, "--seed", 1)
    terminal.until(ASK)
    for _ in range(2):
        terminal.child.sendline("Hello")
        text = terminal.until(ASK)
        assert re.search(
            r"^error: keys and values of one sequence of \d+ positions need .* GB, but cpu has", text, re.M
        )
        assert "tokens]" not in text
    terminal.child.sendeof()
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def test_answers_that_end_by_themselves_and_ctrl_d(parrot: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    words = f"'{sys.executable}' -m main interactive '{parrot}' --max_tokens 18 --temperature 0 > '{kept}'"
    terminal = Terminal()
    terminal.child.close(force=True)
    terminal.child = pexpect.spawn(
        "/bin/sh", ["-c", words], cwd=str(ROOT), env={**ENVIRONMENT, "TERM": "dumb"}, timeout=PATIENCE
    )
    terminal.pieces.clear()
    terminal.until(ASK)
    terminal.child.sendline("one")
    assert re.search(r"\[18 tokens, [\d.]+ tokens/s; first after [\d.]+ s; length\]\n", terminal.until(rf"\]\n{ASK}"))
    terminal.child.sendeof()
    assert terminal.end() == 0
    # What is kept are the texts, not the questions.
    assert kept.read_text(encoding="utf-8") == f"one{PARROT * 2}\n\n"


# --- piped


def test_piped_lines(cli: Command, parrot: Path) -> None:
    words = ("interactive", parrot, "--max_tokens", 9, "--temperature", 0)
    done = cli(*words, stdin="one\r\n\n  \ntwo\né 🙂 漢")  # the last line has no end
    assert done.text == f"one{PARROT}\ntwo{PARROT}\né 🙂 漢{PARROT}\n"
    loaded, *speeds = done.err.splitlines()
    assert loaded.startswith("loaded ")
    assert len(speeds) == 3
    assert all(re.fullmatch(STATS.strip("\\n"), speed) for speed in speeds)
    assert ASK not in done.out + done.err
    assert cli(*words, stdin="").text == ""


def test_piped_lines_are_alike_with_a_seed(cli: Command, tmp_path: Path) -> None:
    words = ("interactive", make_folder(tmp_path / "tiny"), "--max_tokens", 8, "--temperature", 1.5, "--top_p", 1)
    first = cli(*words, "--seed", 1, stdin="Hello\nHello\n").text
    assert (
        first == cli(*words, "--seed", 1, stdin="Hello\nHello\n").text != cli(*words, "--seed", 2, stdin="Hello\n").text
    )


def test_an_error_in_piped_lines_ends_with_exit_code_2(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "full", sliding_window=None)
    error = cli("interactive", folder, "--max_tokens", 10**15, stdin="Hello\nHello\n").error
    assert error.startswith("keys and values of one sequence")


def test_no_half_character_is_ever_written(parrot: Path) -> None:
    """Every write of the process is whole UTF-8: they are received one by one."""
    words = [sys.executable, "-m", "main", "interactive", str(parrot), "--max_tokens", "90", "--temperature", "0"]
    pipe: Any = subprocess.PIPE
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM)
    with (
        ours,
        subprocess.Popen(
            words, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=theirs, stderr=pipe, bufsize=0
        ) as running,
    ):
        theirs.close()
        assert running.stdin is not None
        running.stdin.write("é!\n".encode())
        running.stdin.close()
        chunks = []
        while chunk := ours.recv(4096):
            chunks.append(chunk.decode())  # strictly
        assert running.wait(timeout=PATIENCE) == 0
    assert "".join(chunks) == f"é!{PARROT * 10}\n"
    assert len(chunks) > (30 if sys.platform == "linux" else 2)


def test_escape_sequences_that_are_typed_are_text() -> None:
    """A colour begins as what a mouse sends does, which prompt_toolkit took for one and failed."""
    toolkit = pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as typed:
        session = toolkit.PromptSession(key_bindings=terminal._keys(), input=typed, output=DummyOutput())
        typed.send_text("\x1b[31mred\x1b[0m\r")
        assert session.prompt() == "\x1b[31mred\x1b[0m"
