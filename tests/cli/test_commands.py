"""The commands as a user types them: what goes to stdout and stderr, and how words become prompts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mistral
from mistral.cli import flags, help
from mistral.cli.commands import COMMANDS
from mistral.cli.flags import parse, readable_by_fire
from mistral.cli.generate import DEMO_PROMPTS, SEPARATOR
from mistral.formats.folder import BUNDLED
from mistral.generate import complete, generate
from mistral.loader.load import load
from mistral.sampling_params import SamplingParams
from mistral.util import progress
from mistral.util.errors import UsageError
from tests.support.commands import ENVIRONMENT, Command, in_process
from tests.support.folders import ROOT, make_folder, make_parrot

NOTHING: Any = SimpleNamespace(
    **dict.fromkeys(("folder", "words", "templates"), Path("/nowhere")),
    release=None,
    args=SimpleNamespace(vocab_size=10),
)
PARROT = "é🙂漢 x"
SHORT = ("--max_tokens", 6, "--temperature", 0)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parrot(tmp_path_factory.mktemp("folders") / "parrot", PARROT)


def process(*words: object, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    """`python -m main` with these words: exit code, stdout and stderr, strictly UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "main", *map(str, words)],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        input=stdin,
        capture_output=True,
        timeout=600,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# --- as processes


@pytest.mark.skipif(not (BUNDLED / "consolidated.safetensors").exists(), reason="the bundled model is not trained yet")
def test_demo_of_the_bundled_model() -> None:
    code, out, err = process("demo", "--max_tokens", "8", "--temperature", "0")
    prompts = json.loads((BUNDLED / "prompts.json").read_text(encoding="utf-8"))
    texts = out.split(f"\n{SEPARATOR}\n")
    assert (code, len(texts), texts[-1]) == (0, 4, "")
    for text, prompt in zip(texts, prompts, strict=False):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)
    assert SEPARATOR == "=" * 21
    line, *more = err.splitlines()
    assert not more
    assert line.startswith("loaded the bundled model, ")
    for fact in ("consolidated.safetensors", "device ", "weights/compute/cache ", "attention ", "window 64"):
        assert fact in line
    assert "rope_theta 10000 (given in params.json)" in line


def test_text_is_utf8_where_the_locale_is_ascii(parrot: Path) -> None:
    words = ("complete", parrot, "--max_tokens", len(PARROT.encode()) * 2, "--temperature", 0)
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    code, out, err = process(*words, stdin="é!".encode(), **environment)
    assert (code, out) == (0, PARROT * 2 + "\n")
    assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_error(parrot: Path) -> None:
    long = [sys.executable, "-m", "main", "complete", str(parrot), "x", "--max_tokens", "1000000"]
    help_ = [sys.executable, "-m", "main", "complete", "--help"]
    for words, started in ((long, b"\xc3\xa9"), (help_, b"us")):
        pipe: Any = subprocess.PIPE
        with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, bufsize=0) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            if words is help_:
                running.stdout.close()  # before a word is written
            else:
                assert running.stdout.read(2) == started
                running.stdout.close()
            err = running.stderr.read().decode()
            assert running.wait(timeout=600) == 0, err
        assert "Traceback" not in err
        assert "BrokenPipe" not in err
        assert "Exception ignored" not in err


def test_a_process_without_stdin() -> None:
    words = f"{sys.executable} -m main complete <&-"
    done = subprocess.run(["sh", "-c", words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no prompt: give one in quotes")
    assert len(done.stderr.splitlines()) == 1


def test_help_and_version_import_no_torch() -> None:
    lines = [["--help"], ["-h"], ["help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["demo", "x", "-h"]]
    code = (
        f"import sys, main; codes = [main.main(line) for line in {lines}];"
        "print(codes, sorted(sys.modules.keys() & {'torch', 'numpy', 'sentencepiece', 'safetensors'}));"
        "from main import generate; print(generate.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-2:] == [f"{[0] * len(lines)} []", "mistral.generate"]


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(cli: Command, name: str) -> None:
    text = cli(name, "--help").text
    takes = {"convert": "SRC DST --to TO", "compare": "A B", "pack": "[FOLDER] --output OUTPUT", "completion": "SHELL"}
    takes |= {"batch": "INPUT.. OUTPUT", "deploy": "[FOLDER] --target TARGET"}
    takes["finetune"] = "[FOLDER] --data DATA --out OUT"
    assert f"usage: python -m main {name} {takes.get(name, '[FOLDER]')}" in text
    if name != "completion":
        assert text.count(f"python -m main {name}") >= 3  # examples
    names = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    of_all = {"--max_tokens", "--device", "--dtype", "--attention", "--execution", "--threads", "--chunk_size"}
    of_some = {
        "convert": {"--to", "--dtype", "--quant", "--adapter"},
        "inspect": {"--json"},
        "bench": {"--shape", "--quant"},
        "perplexity": of_all - {"--max_tokens"},
        "eval": of_all - {"--max_tokens", "--chunk_size"} | {"--task", "--lengths", "--json"},
        "batch": {"--model", "--engine", "--ray", "--device"},
        "deploy": {"--target", "--output", "--accept"},
        "finetune": {"--data", "--out", "--lora", "--full", "--device"},
        "serve": of_all - {"--max_tokens"} | {"--host", "--port", "--api_key"},
        "verify": {"--full", "--json", "--seed"},
        "pack": {"--output", "--file", "--top", "--weights", "--full"},
        "compare": {"--dtype", "--file", "--model", "--json"},
        "trace": {"--output", "--plan", "--window", "--chunk_size"},
        "mutants": {"--output", "--mutant"},
        "completion": set(),
    }
    assert of_some.get(name, of_all) <= set(names)
    assert cli(name, "/nowhere", "--max_tokens", "x", "-h").text == text
    assert "--kernels" not in text
    # What help shows is what a user may type.
    for line in text.splitlines():
        _, found, words = line.partition(f"python -m main {name} ")
        if found and "usage" not in line:
            parse(COMMANDS[name], shlex.split(re.split("[>|]", words)[0]))


def test_overview_and_version(cli: Command) -> None:
    text = cli("--help").text
    assert [name for name in COMMANDS if f"\n  {name} " in text] == list(COMMANDS)
    assert mistral.__version__ in text
    assert cli("--version").text == f"{mistral.__version__}\n"


def test_no_command_and_no_such_command(cli: Command) -> None:
    assert {"demo", "interactive", "complete", "convert"} <= set(COMMANDS)
    assert cli().error == f"no command: {', '.join(COMMANDS)}; see --help"
    assert cli("chat").error == "no command 'chat'; did you mean interactive?"
    assert cli("wolf").error == f"no command 'wolf': {', '.join(COMMANDS)}; see --help"
    assert cli("complte", "x").error == "no command 'complte'; did you mean complete?"
    assert cli("plants").error == "the command plants is now called mutants"
    assert cli("--max_tokens", 3, "demo").error.startswith("no command '--max_tokens'")
    assert cli("two\nlines").error.startswith("no command 'two\\nlines'")


def test_every_flag_has_help_and_every_number_is_checked(cli: Command) -> None:
    for name, command in COMMANDS.items():
        texts = help.help_texts(command)
        for p in inspect.signature(command).parameters.values():
            if p.kind is p.KEYWORD_ONLY and flags.kind_of(p):
                assert len(texts[p.name]) > 5, (name, p.name)
                if flags.kind_of(p) in (int, float) and p.name != "seed":
                    words = {"a": "x", "b": "y", "output": "/nowhere/z", "src": "x", "dst": "y", "to": "hf"}
                    words |= {"data": "x", "out": "/nowhere/z", "input": "x", "target": "vllm", "task": "reach"}
                    needed = [q for q in inspect.signature(command).parameters.values() if q.default is q.empty]
                    given = [f"--{q.name}={words[q.name]}" for q in needed]
                    assert f"{p.name} is -7" in cli(name, *given, f"--{p.name}=-7").error


def test_one_default_of_each_sampling_parameter() -> None:
    for command in (COMMANDS["complete"], COMMANDS["interactive"]):
        shown = inspect.signature(command).parameters
        for field in dataclasses.fields(SamplingParams):
            if field.name in shown:
                assert shown[field.name].default == field.default
    demo = inspect.signature(COMMANDS["demo"]).parameters
    assert (demo["max_tokens"].default, demo["temperature"].default) == (35, 0)
    assert demo["top_p"].default == SamplingParams().top_p


# --- demo


def test_demo_of_a_folder(cli: Command, tiny: Path) -> None:
    out = cli("demo", tiny, "--max_tokens", 4, "--temperature", 0)
    texts = out.text.split(f"\n{SEPARATOR}\n")
    assert (len(texts), texts[-1]) == (4, "")
    for text, prompt in zip(texts, DEMO_PROMPTS, strict=False):
        assert text.startswith(prompt.rstrip())
    assert out.err.startswith(f"loaded {tiny}: ")
    assert len(out.err.splitlines()) == 1
    # Greedy is the default, and nothing but the count of tokens depends on how it is computed.
    assert cli("demo", f"--folder={tiny}", "--max-tokens=4", "--chunk_size", 1, "--threads", 1).text == out.text


# --- complete


def test_only_the_continuation_goes_to_stdout(cli: Command, parrot: Path) -> None:
    done = cli("complete", parrot, "a prompt", "--max_tokens", 9, "--temperature", 0)
    assert done.text == "é🙂漢\n"
    loaded, speed = done.err.splitlines()
    assert loaded.startswith(f"loaded {parrot}: ")
    assert speed.startswith("[9 tokens, ")
    assert "tokens/s; first after " in speed
    assert speed.endswith("; length]")


@pytest.mark.parametrize(
    "words",
    [
        ("{folder}", "Hello", "--max_tokens", "6", "--temperature", "0"),
        ("--max_tokens=6", "--temperature=0", "{folder}", "Hello"),
        ("--max-tokens", "6", "--temperature", "0", "--", "{folder}", "Hello"),
        ("{folder}", "--prompt", "Hello", "--max-tokens=6", "--temperature=0"),
        ("--folder={folder}", "Hello", "--max_tokens", "6", "--temperature", "0.0"),
        ("--prompt=Hello", "{folder}", "--max_tokens", "6", "--temperature", "0"),
        ("{folder}", "Hello", "--max_tokens", "6", "--temperature", "0", "--chunk_size", "1", "--device", "cpu"),
        ("{folder}", "Hello", "--max_tokens", "6", "--top_k", "1", "--json=false", "--attention", "eager"),
    ],
)
def test_one_command_in_many_spellings(cli: Command, tiny: Path, words: tuple[str, ...]) -> None:
    want = cli("complete", tiny, *SHORT, stdin="Hello\n").text
    assert len(want) > 2
    assert cli("complete", *(word.format(folder=tiny) for word in words)).text == want


def test_one_word_that_is_a_folder_is_the_folder(
    cli: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("mistral.cli.generate.open_model", lambda folder, *_: seen.append(folder) or NOTHING)
    monkeypatch.setattr("mistral.cli.terminal.stream_one", lambda loaded, prompt, *_, **__: seen.append(prompt))
    cli("complete", tiny, stdin="from stdin\nin two lines\n")
    cli("complete", "Once upon a time", stdin="never read")
    assert cli("complete", tmp_path / "nowhere", stdin="never read").error == f"no such folder: {tmp_path}/nowhere"
    monkeypatch.chdir(tiny.parent)
    cli("complete", "tiny", stdin="x")
    cli("complete", "tinier", stdin="x")
    assert seen == [
        *(str(tiny), "from stdin\nin two lines"),
        *(None, "Once upon a time"),
        *("tiny", "x"),
        *(None, "tinier"),
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        "1e5",
        "[1,2]",
        "None",
        "True",
        "{'a': 1}",
        "-5",
        "- x",
        "",
        "it's",
        '"quoted"',
        "a\nb\\n",
        "é🙂漢",
        "$HOME `ls` %s {x}",
        "a=b",
        "  spaces  ",
        "json.loads",
        "demo",
    ],
)
def test_prompts_arrive_unchanged(cli: Command, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("mistral.cli.generate.open_model", lambda *_: NOTHING)
    monkeypatch.setattr(
        "mistral.cli.terminal.stream_one", lambda loaded, prompt, params, **_: seen.append((prompt, params.stop))
    )
    ways = ((prompt,), (f"--prompt={prompt}",), ("/", prompt), ("--prompt", prompt), ("--", prompt))
    for words in ways:
        assert cli("complete", f"--stop=s{prompt}", *words).code == 0
    assert seen == [(prompt, (f"s{prompt}",))] * len(ways)
    if prompt:
        assert cli("complete", stdin=prompt + "\n").code == 0
        assert seen[-1] == (prompt, ())


@pytest.mark.parametrize("prompt", ["-", "-x", "--", "--json", "--max_tokens=3", "-h", "--help", "---"])
def test_prompts_that_look_like_flags(cli: Command, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("mistral.cli.generate.open_model", lambda *_: NOTHING)
    monkeypatch.setattr("mistral.cli.terminal.stream_one", lambda loaded, prompt, *_, **__: seen.append(prompt))
    cli("complete", "--", prompt)
    cli("complete", f"--prompt={prompt}")
    cli("complete", stdin=prompt)
    assert seen == [prompt] * 3


def test_stop_may_be_repeated(cli: Command, parrot: Path) -> None:
    words = ("complete", parrot, "go", "--temperature", 0, "--max_tokens", 50)
    assert cli(*words, "--stop", "漢").text == "é🙂\n"
    assert cli(*words, "--stop", "never", "--stop", "x").text == "é🙂漢 \n"
    both = cli(*words, "--stop", "x", "--stop", "🙂漢")
    assert both.text == "é\n"
    assert both.err.splitlines()[-1].endswith("; stop]")


def test_same_seed_same_text(cli: Command, tiny: Path) -> None:
    words = ("complete", tiny, "Hello", "--max_tokens", 12, "--temperature", 1.5, "--top_p", 1)
    first, again, other = (cli(*words, "--seed", seed).text for seed in (7, 7, 8))
    assert first == again != other


def test_half_a_character_at_the_end_is_still_text(cli: Command, parrot: Path) -> None:
    assert cli("complete", parrot, "go", "--temperature", 0, "--max_tokens", 4).text.rstrip("\ufffd\n") == "é"


def test_no_tokens(cli: Command, tiny: Path) -> None:
    done = cli("complete", tiny, "Hello", "--max_tokens", 0)
    assert done.text == "\n"
    assert done.err.splitlines()[-1] == "[0 tokens; length]"
    assert "note: nothing is computed for --max_tokens 0; with --json prompts are scored" in done.err


def test_a_prompt_that_is_only_scored(cli: Command, tiny: Path, tmp_path: Path) -> None:
    """Its scores are those of `generate`; prompts beside it that go on are not scored."""
    loaded = load(tiny, device="cpu")
    ids = loaded.tokenizer.encode("Hello there")
    _, (want,) = generate([ids], loaded.model, loaded.tokenizer, max_tokens=0)
    words = ("complete", tiny, "Hello there", "--json", "--max_tokens", 0)
    found = json.loads(cli(*words, "--top_logprobs", 2).text)
    assert found["prompt_tokens"] == ids
    assert found["tokens"] == found["logprobs"] == []
    assert found["prompt_logprobs"] == pytest.approx(want, abs=1e-5)
    assert [len(top) for top in found["prompt_top_logprobs"]] == [2] * (len(ids) - 1)
    assert all(got <= top[0][1] + 1e-6 for got, top in zip(want, found["prompt_top_logprobs"], strict=True))
    results = [
        json.loads(line)
        for line in cli("complete", tiny, "--file", write_prompts(tmp_path), "--json", *SHORT).text.splitlines()
    ]
    assert ["prompt_logprobs" in result for result in results] == [False, False, False, True, False]
    assert results[3]["prompt_logprobs"] == []


def write_prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = ["Hello", [1, 400, 500], {"prompt": "Good é", "max_tokens": 3}, {"prompt": [1], "max_tokens": 0}, "Hello"]
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_files_of_prompts(cli: Command, tiny: Path, tmp_path: Path) -> None:
    file = write_prompts(tmp_path)
    text = cli("complete", tiny, "--file", file, *SHORT).text
    lines = cli("complete", tiny, "--file", file, "--json", *SHORT).text.splitlines()
    results = [json.loads(line) for line in lines]
    assert [r["index"] for r in results] == [0, 1, 2, 3, 4]
    assert [len(r["tokens"]) for r in results] == [6, 6, 3, 0, 6]
    assert [len(r["logprobs"]) for r in results] == [6, 6, 3, 0, 6]
    assert {r["finish_reason"] for r in results} == {"length"}
    assert results[1]["prompt_tokens"] == [1, 400, 500]
    assert results[0] == {**results[4], "index": 0}
    assert text == "".join(f"{r['text']}\n{'=' * 21}\n" for r in results)
    assert not any("top_logprobs" in r for r in results)
    # The same as in a script, and as each alone; queued or not.
    loaded = load(tiny, device="cpu")
    made = complete(["Hello"], loaded.model, loaded.tokenizer, max_tokens=6, temperature=0.0)[0]
    assert (results[0]["tokens"], results[0]["text"]) == (made.tokens, made.text)
    assert results[0]["logprobs"] == pytest.approx(made.logprobs, abs=1e-5)
    alone = json.loads(cli("complete", tiny, "Hello", "--json", *SHORT).text)
    assert (alone["tokens"], alone["text"]) == (made.tokens, made.text)
    assert cli("complete", tiny, "--file", file, "--max_batch_size", 1, *SHORT).text == text
    assert cli("complete", tiny, "--file", "-", *SHORT, stdin=file.read_bytes()).text == text


def test_samples_of_prompts_come_in_order(cli: Command, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Hello"\n"Good"\n')
    words = ("complete", tiny, "--file", file, "--n", 3, "--seed", 1, "--max_tokens", 5, "--temperature", 2)
    entries = [json.loads(line) for line in cli(*words, "--json").text.splitlines()]
    assert [(e["index"], e["sample"]) for e in entries] == [(i, k) for i in range(2) for k in range(3)]
    assert len({tuple(e["tokens"]) for e in entries[:3]}) == 3
    shown = cli("complete", tiny, "Hello", *words[4:]).text
    assert shown == "".join(f"{e['text']}\n{SEPARATOR}\n" for e in entries[:3])


@pytest.mark.parametrize("json_lines", [True, False])
def test_ctrl_c_loses_no_text_that_has_ended(
    json_lines: bool, cli: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four prompts never ends: what came behind it is printed by its index, or counted."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Hello"\n"Good"\n"The king"\n"He"\n')
    words = ("complete", tiny, "--file", file, "--max_tokens", 3, "--temperature", 0, *["--json"] * json_lines)
    whole = cli(*words).text.splitlines(keepends=True)
    completions = mistral.generate.completions

    def interrupted(*given: Any, **how: Any) -> Iterator[Any]:
        found = dict(completions(*given, **how))
        for index in (0, 3, 2):
            yield index, found[index]
        raise KeyboardInterrupt

    monkeypatch.setattr("mistral.generate.completions", interrupted)
    done = cli(*words)
    assert done.code == 130
    if json_lines:
        assert done.out == "".join(whole[i] for i in (0, 2, 3))
        assert "interrupted: 3 of 4 texts are printed\n" in done.err
    else:
        assert "".join(whole).startswith(done.out)
        assert done.out.count(SEPARATOR) == 1
        more = "2 more had ended, behind one that had not (--json prints those too)"
        assert f"interrupted: 1 of 4 texts are printed; {more}\n" in done.err


def test_prompts_that_take_long_are_counted_on_stderr(
    cli: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"Hello"\n"Good"\n')
    monkeypatch.setattr(progress, "EVERY", 0.0)
    words = ("complete", tiny, "--file", file, "--n", 2, *SHORT)
    assert [f"completing: {n} of 4 texts" for n in (1, 2, 3)] == [
        line for line in cli(*words).err.splitlines() if "completing" in line
    ]
    assert "completing" not in cli(*words, "--quiet").err


def test_json_with_the_likeliest(cli: Command, parrot: Path) -> None:
    words = ("complete", parrot, "go", "--json", "--top_logprobs", 2, "--temperature", 0, "--max_tokens", 3)
    (line,) = cli(*words).text.splitlines()
    result = json.loads(line)
    assert result["text"].rstrip("\ufffd") == "é"
    assert [[len(pair) for pair in top] for top in result["top_logprobs"]] == [[2, 2]] * 3
    assert [top[0][0] for top in result["top_logprobs"]] == result["tokens"]
    assert [top[0][1] for top in result["top_logprobs"]] == pytest.approx(result["logprobs"])
    assert "é" in line  # as itself, not as \u00e9


# --- flags as such


def a_command(
    folder: str | None = None, *, count: int = 1, share: float = 0.5, on: bool = False, names: list[str] | None = None
) -> None:
    """For the tests."""


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ([], []),
        (["x"], ['--folder="x"']),
        (["--count", "3", "--share", "2"], ["--count=3", "--share=2.0"]),
        (["--count", "-3"], ["--count=-3"]),
        (["--on"], ["--on=true"]),
        (["--on=False"], ["--on=false"]),
        (["--names", "a", "--names=b=c"], ['--names=["a", "b=c"]']),
        (["--folder", "-5"], ['--folder="-5"']),
        (["--", "--on"], ['--folder="--on"']),
        (["é\n"], ['--folder="\\u00e9\\n"']),
    ],
)
def test_parse(words: list[str], want: list[str]) -> None:
    assert parse(a_command, words) == want


def several(input: list[str], output: str, *, count: int = 1) -> None:
    """For the tests."""


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["a", "out"], ['--input=["a"]', '--output="out"']),
        (["a", "b", "--count", "2", "c", "out"], ["--count=2", '--input=["a", "b", "c"]', '--output="out"']),
        (["a", "b", "--output=out"], ['--output="out"', '--input=["a", "b"]']),
        (["--input", "a", "--input", "b", "out"], ['--input=["a", "b"]', '--output="out"']),
        (["a", "--", "--b", "out"], ['--input=["a", "--b"]', '--output="out"']),
    ],
)
def test_several_words_before_the_last_one(words: list[str], want: list[str]) -> None:
    assert parse(several, words) == want


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "missing: INPUT, OUTPUT"),
        (["a"], "missing: OUTPUT"),
        (["--output", "out"], "missing: INPUT"),
        (["--input=a", "b", "out"], "unexpected argument 'out'"),
    ],
)
def test_several_words_that_are_too_few(words: list[str], error: str) -> None:
    with pytest.raises(UsageError, match=error):
        parse(several, words)


def test_short_flags_with_their_number_in_one_word() -> None:
    complete = COMMANDS["complete"]
    assert parse(complete, ["-n3", "-t0.5", "-s", "1", "--prompt", "x"]) == parse(
        complete, ["--max_tokens=3", "--temperature=0.5", "--seed=1", "--prompt=x"]
    )
    assert parse(complete, ["--prompt=-night"]) == ['--prompt="-night"']


def test_what_fire_hands_over_is_what_was_typed() -> None:
    import fire

    seen: list[Any] = []

    def command(folder: str | None = None, *, names: list[str] | None = None, share: float = 0.5) -> None:
        seen.append((folder, names, share))

    for word in ("1e5", "-", "--", "[1]", "None", "a,b", "'x'", '"', "\\", "\udce9", "é", ""):
        checked = parse(command, [f"--folder={word}", "--share", "1e-5", f"--names=n{word}"])
        fire.Fire(readable_by_fire(command), command=checked)
        assert seen.pop() == (word, [f"n{word}"], 1e-5)


def test_the_console_script_is_the_same_main() -> None:
    import main as top
    from mistral import cli as package

    assert top.main is package.main
    assert os.path.isfile(ROOT / "main.py")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        top.nothing  # noqa: B018


# --- words that are easily misread


def test_a_folder_that_is_not_there_is_no_prompt_while_text_waits_on_stdin() -> None:
    command = [sys.executable, "-m", "main", "complete", "mistral-7B-v0.1", "--max_tokens", "1"]
    done = subprocess.run(command, input="Once", cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no such folder: mistral-7B-v0.1")
    assert done.stdout == ""
    quiet = subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert quiet.returncode == 0
    assert "so it is the prompt" in quiet.stderr


@pytest.mark.parametrize("word", ["false", "OFF", "1"])
def test_a_blank_after_a_switch(cli: Command, word: str) -> None:
    done = cli("complete", "The king", "--deterministic", word)
    assert done.code == 2
    assert done.error == f"--deterministic {word}: write --deterministic=true or --deterministic=false, without a space"


def in_a_process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, text=True, timeout=300, **options)


def test_a_mistyped_folder_is_not_a_prompt() -> None:
    for words in (["--folder=nosuch"], ["tests/nosuch"], ["./no/such/folder"], ["nosuch/"], ["nosuch", "hello"]):
        run = in_a_process("complete", *words, capture_output=True, stdin=subprocess.DEVNULL)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr.startswith("error: no such folder: ")


def test_closed_streams(tmp_path: Path) -> None:
    """Closed by the shell with >&- or 2>&-: nothing goes to the other stream, and text that nobody gets is an error."""
    script = f"{sys.executable} -m main complete hi --max_tokens 2 --temperature 0"
    run = subprocess.run(f"{script} >&-", shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 2
    assert run.stderr.endswith("error: stdout is closed: there is nowhere to print to\n")
    run = subprocess.run(f"{script} 2>&-", shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert run.returncode == 0
    assert "loaded" not in run.stdout
