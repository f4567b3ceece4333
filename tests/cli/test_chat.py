"""`interactive --instruct` as people and scripts have it: commands, Ctrl-C, line editing; and `complete --suffix`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral.chat.templates import find_template
from mistral.cli import generate
from mistral.cli.conversation import Conversation
from mistral.cli.interrupts import Interrupt
from mistral.cli.terminal import QUOTES
from mistral.formats.convert import convert
from mistral.generate import complete
from mistral.tokenizer import Tokenizer
from tests.support.adapters import write_native
from tests.support.commands import ENVIRONMENT, PATIENCE, Command, in_process
from tests.support.folders import ROOT, make_folder, random_state, write_weights
from tests.support.thinker import ANSWER, SYSTEM_PROMPT, THOUGHT, make_thinker

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


# --- piped


def test_a_conversation_over_a_pipe(cli: Command, folder: Path, tmp_path: Path) -> None:
    chat = ("interactive", folder, "--instruct", *SHORT)
    kept = tmp_path / "chat.json"
    lines = [
        "Hi",
        "  ",
        "Bye",
        "/undo",
        f"/save {kept}",
        f"/save {kept}",
        "/system",
        "/system Be brief.",
        "/reset",
        f"/load {kept}",
        "Bye",
    ]
    done = cli(*chat, stdin="\n".join(lines))
    texts = done.text.split("\n")
    assert texts[3:] == [""]
    assert texts[1] == texts[2]  # the same question, after it was undone, saved and loaded
    said = done.err.splitlines()
    assert said[1] == "template v1, by tokenizer.model"
    reads = [line for line in said if line.startswith("[")]
    assert len(reads) == 3
    assert "cached" not in reads[0]
    assert " cached; " in reads[1]
    assert said[said.index(reads[1]) + 1] == "dropped: Bye"
    saved = f"saved 1 turn in {kept}"
    for line in (
        saved,
        f"{saved}, in the place of what was there",
        "system prompt: none",
        "system prompt: Be brief.",
        "a new conversation",
    ):
        assert line in said
    (loaded,) = [line for line in said if line.startswith("loaded 1 turn from")]
    assert "temperature 0.0" in loaded
    assert "max_tokens 5" in loaded
    assert json.loads(kept.read_text())["messages"][0]["content"] == "Hi"


def test_help_names_every_command(cli: Command, folder: Path) -> None:
    done = cli("interactive", folder, "--instruct", stdin="/help\n/quit\nnever read")
    assert done.text == ""
    commands = Conversation(None, str)._commands  # type: ignore[arg-type]
    assert [line.split()[0] for line in done.err.splitlines()[3:]] == [*commands, "//...", QUOTES]


def test_what_is_asked_for_is_printed_with_quiet(cli: Command, folder: Path) -> None:
    done = cli("interactive", folder, "--instruct", "--quiet", *SHORT, stdin="/system Hm.\n/system\n/show\n/help\n")
    lines = done.err.splitlines()
    assert lines[0] == lines[2] == "system prompt: Hm."
    assert lines[1].startswith("max_tokens")
    assert lines[3].startswith("/help")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/exit", "no command /exit; did you mean /quit?; // begins a question with a slash"),
        ("/nope", "no command /nope: /help lists them; // begins a question with a slash"),
        ("/undo", "there is nothing to undo"),
        ("/undo twice", "/undo takes nothing after it"),
        ("/save", "/save needs the name of a file"),
        ("/load /nowhere/chat.json", "/nowhere/chat.json cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_line_over_a_pipe_is_an_error(cli: Command, folder: Path, line: str, error: str) -> None:
    done = cli("interactive", folder, "--instruct", *SHORT, stdin=f"{line}\nHi\n")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[3:] == [f"error: {error}"]


def test_a_question_may_begin_with_a_slash(cli: Command, folder: Path) -> None:
    lines = "//undo\n/undo\n"
    done = cli("interactive", folder, "--instruct", *SHORT, stdin=lines)
    assert done.code == 0
    assert done.err.splitlines()[-1] == "dropped: /undo"


def test_words_that_are_refused(cli: Command, folder: Path) -> None:
    for words, error in (
        (("--system", "x"), "--system belongs to a conversation: add --instruct"),
        (("--template", "v3"), "--template belongs to a conversation: add --instruct"),
        (
            ("--instruct", "--template", "v9"),
            "no template is called 'v9': v1, v2, v3, v7, v11, v13, v15, mistrallite, or a file that ends in .jinja",
        ),
        (("--instruct", "--template", "v3"), "template v3 needs the control token [INST], which tokenizer.model lacks"),
    ):
        assert cli("interactive", folder, *words, stdin="Hi\n").error == error


def test_blanks_before_a_command(cli: Command, folder: Path) -> None:
    done = cli("interactive", folder, "--instruct", *SHORT, stdin="Hi\n  /undo\n")
    assert done.code == 0
    assert "dropped: Hi" in done.err


def test_a_file_goes_on_with_its_own_model_in_any_layout(cli: Command, folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "chat.json"
    assert cli("interactive", folder, "--instruct", *SHORT, stdin=f"Hi\n/save {kept}\nBye\n").code == 0
    convert(folder, tmp_path / "hf", "hf")
    shutil.copytree(folder, tmp_path / "other")
    write_weights(tmp_path / "other", random_state(seed=1))
    # Converted, its template is a file, which gives the same ids; a conversation goes on with the one that it had.
    for name, *words in ((folder,), (tmp_path / "hf", "--template", "v1")):
        done = cli("interactive", name, "--instruct", *words, stdin=f"/load {kept}\n")
        assert done.code == 0
        assert f"loaded 1 turn from {kept}" in done.err
    for name, error in (
        ((tmp_path / "other",), "is a conversation with another model"),
        ((folder, "--template", "mistrallite"), ""),
    ):
        done = cli("interactive", *name, "--instruct", stdin=f"/load {kept}\n")
        assert done.code == 2
        assert error in done.err.splitlines()[-1]


# --- Ctrl-C


def test_ctrl_c_after_the_last_step_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(ValueError, match="as before"), Interrupt():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("as before")
    with Interrupt() as interrupt:
        interrupt.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_breaks_off_at_once() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), Interrupt():  # noqa: PT012
        for i in range(2):
            steps.append(i)
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(2)
    assert steps == [0, 1]


# --- at a terminal


def at_terminal(folder: Path, *words: object, **environment: str) -> Any:
    arguments = ["-m", "main", "interactive", str(folder), "--instruct", *map(str, words)]
    env = {**ENVIRONMENT, **environment}
    child = pexpect.spawn(
        sys.executable, arguments, cwd=str(ROOT), env=env, timeout=PATIENCE, encoding="utf-8", echo=True
    )
    child.expect("Ctrl-D the conversation")
    return child


def test_at_a_terminal_only_the_line_fails_and_ctrl_c_keeps_the_cache(folder: Path) -> None:
    child = at_terminal(folder, "--max_tokens", 100_000, "--temperature", 0, TERM="dumb")
    child.expect("> ")
    child.sendline("/nope")
    child.expect("error: no command /nope")
    child.expect("> ")
    child.sendline("Hi")
    child.expect(r"\w+ \w+")
    child.sendintr()
    child.expect(r"\[\d+ tokens?.*prompt tokens? prefilled; interrupted\]")
    child.expect("> ")
    child.sendline("Bye")
    child.expect(r"\w+ \w+")
    child.sendintr()
    child.expect(r"\d+ prompt tokens? prefilled, \d+ cached; interrupted\]")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_lines_are_edited_and_remembered_by_prompt_toolkit(folder: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    child = at_terminal(folder, *SHORT, TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    child.expect(r"\x1b\[\?2004h")  # pasted lines are taken as one
    child.send("Hix\x7f there\r")
    child.expect(r"prompt tokens? prefilled; \w+\]")
    child.expect(r"\x1b\[\?2004h")
    child.send("/undo\r")
    child.expect("dropped: Hi there")
    child.expect(r"\x1b\[\?2004h")
    child.send("\x1b[A\x1b[A\r")  # two lines back
    child.expect(r"prompt tokens? prefilled.*; \w+\]")
    child.expect(r"\x1b\[\?2004h")
    child.send("half a line\x03")
    child.expect(r"\x1b\[\?2004h")
    child.send("/undo\r")
    child.expect("dropped: Hi there")
    child.expect(r"\x1b\[\?2004h")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("typed", ["/undo\n\x04", "\x04"])
def test_an_end_that_is_typed_during_an_answer(folder: Path, typed: str) -> None:
    """Behind a whole line too: both wait until somebody asks, when the terminal gives a null character for the end."""
    pytest.importorskip("prompt_toolkit")
    child = at_terminal(folder, "--max_tokens", 100_000, "--temperature", 0, TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    child.expect(r"\x1b\[\?2004h")
    child.send("Hi\r")
    child.expect(r"\w+ \w+ \w+ \w+")
    child.send(typed)
    child.expect(r"\w+ \w+ \w+ \w+")
    os.kill(child.pid, signal.SIGINT)  # Ctrl-C at the terminal would drop what was typed
    child.expect(r"interrupted\]")
    if "undo" in typed:
        child.expect("dropped: Hi")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_pasted_lines_are_one_question_and_bytes_that_are_no_text_an_error(folder: Path) -> None:
    pytest.importorskip("prompt_toolkit")
    child = at_terminal(folder, *SHORT, TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
    child.expect(r"\x1b\[\?2004h")
    child.send("\x1b[200~two\nlines\x1b[201~\r")
    child.expect(r"prompt tokens? prefilled; \w+\]")
    child.expect(r"\x1b\[\?2004h")
    os.write(child.child_fd, b"voil\xff\r")
    child.expect("error: the text is not valid Unicode at character 4")
    child.expect(r"\x1b\[\?2004h")
    child.send("/undo\r")
    child.expect(r"dropped: two\s+lines")
    child.send("\x04")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.long
def test_without_prompt_toolkit_lines_are_read_plainly(folder: Path) -> None:
    blocked = "import sys; sys.modules['prompt_toolkit'] = None; from mistral.cli import main; sys.exit(main())"
    words = ["-c", blocked, "interactive", str(folder), "--instruct", *map(str, SHORT)]
    env = {**ENVIRONMENT, "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, words, cwd=str(ROOT), env=env, timeout=PATIENCE, encoding="utf-8")
    child.expect("> ")
    child.sendline("Hi")
    child.expect(r"prompt tokens? prefilled; \w+\]")
    child.expect("> ")
    child.sendline("/undo")
    child.expect("dropped: Hi")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# --- gaps


@pytest.fixture(scope="module")
def codestral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mistral_common = pytest.importorskip("mistral_common")
    data = Path(mistral_common.__file__).parent / "data"
    made = make_folder(tmp_path_factory.mktemp("models") / "gaps", tokenizer=False, vocab_size=32768)
    shutil.copy(data / "mistral_instruct_tokenizer_240323.model.v3", made / "tokenizer.model.v3")
    return made


def test_filling_a_gap(cli: Command, codestral: Path, tmp_path: Path) -> None:
    words = ("complete", codestral, "--json", *SHORT)
    template = find_template(Tokenizer(codestral / "tokenizer.model.v3"))
    one = template.encode_fim("def f(", "return x")
    for done in (
        cli(*words, "def f(", "--suffix", "return x"),
        cli(*words, "--suffix", "return x", stdin="def f("),
    ):
        assert json.loads(done.text)["prompt_tokens"] == one
    lines = tmp_path / "gaps.jsonl"
    lines.write_text('{"prompt": "def f(", "suffix": "return x"}\n"def f("\n{"prompt": "a", "suffix": "b"}\n')
    found = [json.loads(line)["prompt_tokens"] for line in cli(*words, "--file", lines).text.splitlines()]
    assert found[0] == one
    assert found[1] == Tokenizer(codestral / "tokenizer.model.v3").encode("def f(")
    assert found[2] == template.encode_fim("a", "b")


def test_the_text_of_a_gap_is_what_the_model_makes(cli: Command, codestral: Path) -> None:
    from mistral.loader.load import load

    loaded = load(codestral, device="cpu")
    ids = find_template(loaded.tokenizer).encode_fim("def f(", "return x")
    (want,) = complete([ids], loaded.model, loaded.tokenizer, max_tokens=5, temperature=0)
    done = cli("complete", codestral, "def f(", "--suffix", "return x", *SHORT)
    assert done.text == f"{want.text}\n"


def test_gaps_that_cannot_be(cli: Command, codestral: Path, folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "gaps.jsonl"
    lines.write_text('{"prompt": [1, 2], "suffix": "b"}\n')
    for words, error in (
        ((folder, "a", "--suffix", "b"), "tokenizer.model has no [PREFIX] and [SUFFIX]"),
        ((codestral, "--file", lines, "--suffix", "b"), "--suffix and --file: give each line of the file its own"),
        ((codestral, "--file", lines), f"{lines} line 1: a suffix must be text, and so must its prompt"),
    ):
        assert cli("complete", *words).error.startswith(error)


# --- thoughts, and adapters


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_thinker(tmp_path_factory.mktemp("models") / "thinker")


def test_thoughts_go_to_stderr_and_answers_to_stdout(cli: Command, thinker: Path, tmp_path: Path) -> None:
    kept = tmp_path / "talk.json"
    lines = ["Why?", "/set thinking hide", "And?", "/show", f"/save {kept}"]
    done = cli("interactive", thinker, "--instruct", "--temperature", 0, "--execution", "eager", stdin="\n".join(lines))
    assert done.text == f"{ANSWER}\n{ANSWER}\n"
    said = done.err.splitlines()
    assert said.count(THOUGHT) == 1
    assert said.count("(thinking ..)") == 1
    assert sum("of them thought" in line for line in said) == 2
    assert any("thinking hide" in line for line in said)
    (answer,) = json.loads(kept.read_text())["messages"][1:2]
    assert (answer["content"], answer["thinking"][0]["text"]) == (ANSWER, THOUGHT)
    assert (
        "/set thinking takes show or hide" in cli("interactive", thinker, "--instruct", stdin="/set thinking maybe").err
    )


def test_complete_prints_answers_alone(cli: Command, thinker: Path, tmp_path: Path) -> None:
    words = ("complete", thinker, "Why?", "--instruct", "--temperature", 0, "--execution", "eager")
    done = cli(*words)
    assert done.text == f"{ANSWER}\n"
    assert THOUGHT in done.err.splitlines()
    assert THOUGHT not in cli(*words, "--thinking", "hide").err
    assert "within a thought (--max_tokens)" in cli(*words, "--max_tokens", 2).err
    told = json.loads(cli(*words, "--json").text)
    assert (told["text"], told["reasoning_content"]) == (ANSWER, THOUGHT)
    assert (
        "--thinking belongs to a conversation: add --instruct"
        in cli("complete", thinker, "a", "--thinking", "hide").error
    )
    assert "thinking is 'loud'; it must be show or hide" in cli(*words, "--thinking", "loud").error


def test_the_system_prompt_that_a_model_is_published_with(cli: Command, thinker: Path) -> None:
    words = ("complete", thinker, "Why?", "--instruct", "--temperature", 0, "--execution", "eager", "--json")
    file = thinker / "SYSTEM_PROMPT.txt"
    file.write_text(SYSTEM_PROMPT)
    try:
        without, used = cli(*words), cli(*words, "--system_file", file)
        assert f"--system_file {file} uses it" in without.err
        assert "--system_file" not in used.err
        control = Tokenizer(thinker / "tekken.json").control_tokens
        begins = control["[SYSTEM_PROMPT]"]
        assert begins not in json.loads(without.text)["prompt_tokens"]
        assert begins in json.loads(cli(*words, "--system", "").text)["prompt_tokens"]  # a prompt, without text
        think = control["[THINK]"]
        assert (
            think in json.loads(used.text)["prompt_tokens"],
            think in json.loads(without.text)["prompt_tokens"],
        ) == (
            True,
            False,
        )
        assert (
            "--system and --system_file: give one of them" in cli(*words, "--system", "a", "--system_file", file).error
        )
        file.write_text("[THINK] for ever")
        assert "do not go together" in cli(*words, "--system_file", file).error
    finally:
        file.unlink()
    assert "cannot be read: No such file" in cli(*words, "--system_file", file).error
    assert "reasoning_effort is 'high'" in cli(*words, "--reasoning_effort", "high").error


def test_a_conversation_changes_its_adapter(cli: Command, folder: Path, tmp_path: Path) -> None:
    one, two = write_native(tmp_path / "one"), write_native(tmp_path / "two", seed=8)
    chat = ("interactive", folder, "--instruct", *SHORT)
    alone = [cli(*chat, *more, stdin="Hi").text for more in ((), ("--adapter", one), ("--adapter", two))]
    assert len(set(alone)) == 3
    lines = [
        "Hi",
        "/undo",
        "/adapter one",
        "Hi",
        "/undo",
        "/adapter two",
        "Hi",
        "/undo",
        "/adapter -",
        "Hi",
        "/adapter",
    ]
    done = cli(*chat, "--adapter", one, "--adapter", two, stdin="\n".join(lines))
    texts = done.text.splitlines()
    assert [text + "\n" for text in texts] == [alone[0], alone[1], alone[2], alone[0]]
    assert done.err.splitlines().count("adapter: none, of one, two") == 2
    assert "adapter: two, of one, two" in done.err
    wrong = cli(*chat, "--adapter", one, "--adapter", two, stdin="/adapter three")
    assert "no adapter is called 'three'; there are one, two" in wrong.err
    assert "no adapters are beside the weights" in cli(*chat, stdin="/adapter one").err


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_an_answer_ends_where_its_template_ends(
    cli: Command, monkeypatch: pytest.MonkeyPatch, how: tuple[str, ...]
) -> None:
    """ChatML's <|im_end|> need not be an end of the tokenizer: fine-tunes often leave </s> there."""
    words = ("complete", "Who is there?", "--instruct", "--template", "v1", "--temperature", "0", "-n", "9")
    tokens = json.loads(cli(*words, "--json").out)["tokens"]
    find = generate.template_of

    def with_an_end(*given: Any) -> Any:
        template = find(*given)
        template.ends = frozenset([tokens[3]])
        return template

    monkeypatch.setattr(generate, "template_of", with_an_end)
    done = cli(*words, *how)
    assert done.code == 0
    if how:
        said = json.loads(done.out)
        assert (said["finish_reason"], said["tokens"]) == ("stop", tokens[:3])
    else:
        assert done.out.strip() == "'"
