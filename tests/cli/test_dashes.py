"""Words that begin with a dash: flags that are known, flags that are refused, and text that only looks like one."""

from __future__ import annotations

import json

import pytest

from mistral.cli import flags, main
from mistral.cli.commands import COMMANDS
from mistral.util.errors import UsageError
from tests.support.commands import Command, in_process

ADVICE = "; for a prompt, put -- before it"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def parsed(command: str, *words: str) -> dict[str, object]:
    """What the flags and words of a command line became."""
    pairs = (word[2:].partition("=") for word in flags.parse(COMMANDS[command], words))
    return {name: json.loads(value) for name, _, value in pairs}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("word", ["-x", "-x=3", "-zz", "-q"])
def test_an_unknown_short_flag_is_no_word_of_any_command(command: str, word: str) -> None:
    for words in ([word], [word, "3"], ["a", word], ["a", "b", word]):
        with pytest.raises(UsageError, match=f"^no flag {word.partition('=')[0]};") as refused:
            flags.parse(COMMANDS[command], words)
        assert (ADVICE in str(refused.value)) == (command in ("complete", "trace"))


def test_what_a_command_knows_instead(cli: Command) -> None:
    short = "-n (--max_tokens), -t (--temperature), -s (--seed)"
    assert cli("complete", "-x", "-n", 3).error == (
        f"no flag -x; short flags of this command: {short}; see --help{ADVICE}"
    )
    assert cli("perplexity", "p.txt", "-n", 3).error == (
        "no flag -n; short flags of this command: -t (--threads); see --help"
    )
    assert cli("inspect", "-x").error == "no flag -x; see --help"
    assert cli("inspect", "-jsn").error == "no flag -jsn; did you mean --json?"
    assert cli("bench", "-q").error == "no flag -q; did you mean --quiet?"
    assert cli("inspect", "--zzz").error == "no flag --zzz; see --help"
    assert cli("complete", "x", "-nx").error == "-n must be a whole number, not 'x'"
    assert cli("complete", "x", "-temprature", 1).error.startswith("no flag -temprature; did you mean --temperature?")


def test_advice_about_prompts_is_for_commands_that_have_one(cli: Command) -> None:
    told = "unexpected argument 'b' (the command takes FOLDER; quote a name that contains spaces)"
    assert cli("inspect", "a", "b").error == told
    assert cli("bench", "-generate", "3").error == "-generate: long flags begin with two dashes"
    assert cli("complete", "-seed", "3").error == f"-seed: long flags begin with two dashes{ADVICE}"


@pytest.mark.parametrize(
    "text", ["- a list item", "-- a sentence", "-5", "-.5", "-5 degrees", "->", "-x marks the spot", "-t is hot"]
)
def test_text_that_begins_with_a_dash(text: str) -> None:
    assert parsed("complete", "a", text) == {"folder": "a", "prompt": text}
    assert parsed("complete", "a", "--system", text, "b") == {"folder": "a", "system": text, "prompt": "b"}


def test_values_that_begin_with_a_dash() -> None:
    assert parsed("complete", "--seed", "-1", "b") == {"seed": -1, "folder": "b"}
    assert parsed("complete", "b", "-s-1", "--frequency_penalty", "-.5") == {
        "folder": "b",
        "seed": -1,
        "frequency_penalty": -0.5,
    }
    assert parsed("complete", "b", "--logit_bias", "3:-100") == {"folder": "b", "logit_bias": [[3, -100.0]]}
    assert parsed("complete", "b", "--stop", "-x", "--stop=--") == {"folder": "b", "stop": ["-x", "--"]}
    assert parsed("complete", "-n", "2", "a", "--", "-x") == {"max_tokens": 2, "folder": "a", "prompt": "-x"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("pack", "-o", "-n", "3"), "--output needs a value; if -n is the value, write --output=-n"),
        (("complete", "x", "--stop", "--json"), "--stop needs a value; if --json is the value, write --stop=--json"),
        (("complete", "x", "-n", "-t", "0"), "--max_tokens needs a value"),
        (("complete", "x", "--system", "--", "y"), "--system needs a value"),
        (("complete", "x", "-n 3"), f"'-n 3' is one word: write -n and its value without quotes{ADVICE}"),
        (
            ("complete", "x", "--seed 3"),
            "no flag --seed 3: write --seed and its value without quotes, or each in its own",
        ),
        (
            ("complete", "x", "\u2013n", "3"),
            f"\u2013n begins with '\u2013', which is no dash of a flag: type - or --{ADVICE}",
        ),
        (("inspect", "\u2014json"), "\u2014json begins with '\u2014', which is no dash of a flag: type - or --"),
    ],
)
def test_flags_that_are_swallowed_or_misprinted(cli: Command, words: tuple[str, ...], error: str) -> None:
    assert cli(*words).error == error


def test_a_lone_dash_is_stdin(cli: Command) -> None:
    same = [cli(*words, "-n", 3, "-t", 0, stdin="The king\n").text for words in (("complete", "-"), ("complete",))]
    assert same[0] == same[1]
    assert cli("complete", "-").error.startswith("no prompt: ")


def test_the_first_word(capfd: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["-n", "3", "complete"], "no command '-n': the command comes first, and its flags behind it: demo, "),
        (["Once upon a time"], "no command 'Once upon a time'; a prompt goes behind a command: complete, or see"),
        (["mistral/bundled"], "no command 'mistral/bundled'; it is a file or folder here: write a command before it"),
        (["--version", "x"], "unexpected argument 'x': --version stands alone"),
        (["pack", "--output="], "'' cannot be written: the name is empty"),
        (["complete", "--file="], "'' cannot be read: the name is empty"),
        (["finetun"], "no command 'finetun'; did you mean finetune?"),
    ):
        assert main(words) == 2
        assert capfd.readouterr().err.startswith(f"error: {told}")


def test_help_before_its_command(capfd: pytest.CaptureFixture[str]) -> None:
    told = []
    for words in (["-h", "pack"], ["--help", "pack"], ["help", "pack"], ["pack", "-h"]):
        assert main(words) == 0
        told.append(capfd.readouterr().out)
    assert len(set(told)) == 1
    assert "pack" in told[0].splitlines()[0]
