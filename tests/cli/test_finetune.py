"""The command finetune, as somebody types it: one line an error, results where they are said to be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mistral.util.files import locked_folder
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder

LINE = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The king."}]}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(LINE) + "\n") * 8, encoding="utf-8")
    return path


def test_from_samples_to_an_answer(run: Command, data: Path, tmp_path: Path) -> None:
    """The folder is printed for the next command; everything else is on stderr."""
    folder, out = make_folder(tmp_path / "base"), tmp_path / "out"
    words = ("finetune", folder, "--data", data, "--out", out, "--seq_len", 64, "--steps", 30, "--lr", 0.05)
    outcome = run(*words, "--eval_split", 0.25, "--merge")
    assert outcome.text == f"{out}\n"
    for said in (
        "6 samples",
        "2 samples held out",
        "30 steps",
        "memory: about",
        "training LoRA of rank 16",
        "step 30/30",
    ):
        assert said in outcome.err
    answered = run("complete", folder, "Who?", "--instruct", "--adapter", out, "--temperature", 0, "--max_tokens", 9)
    assert answered.text.strip() == "The king."
    assert run("inspect", out).text.count("LoRA in the form of PEFT") == 1
    merged = run("complete", out / "merged", "Who?", "--instruct", "--temperature", 0, "--max_tokens", 9)
    assert merged.text == answered.text


def test_a_run_that_was_killed_before_its_first_save_begins_again(run: Command, data: Path, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "base"), tmp_path / "out"
    words = ("finetune", folder, "--data", data, "--out", out, "--steps", 1, "--lora", 2)
    out.mkdir()
    (out / ".state.safetensors.5.part").write_bytes(b"half")
    for log in ('{"time": "now"}\n', "mine\n", '{"step": 1}\nmine\nmine\n'):
        (out / "log.jsonl").write_text(log)
        assert "is there already and not empty" in run(*words).error
    (out / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step"')
    assert "omit --resume" in run(*words, "--resume").error
    assert run(*words).code == 0
    assert {path.name for path in out.iterdir()} >= {"adapter_model.safetensors", "README.md", "log.jsonl"}
    assert not list(out.glob(".*"))
    assert "9.0" not in (out / "log.jsonl").read_text()


def test_mistakes_are_one_line(run: Command, data: Path, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "base"), tmp_path / "out"
    base = ("finetune", folder, "--data", data, "--out")
    assert run("finetune", folder, "--data", data).error == "missing: --out"
    assert run(*base, out, "--lora", 0).error == "--lora is 0; it must be at least 1"
    assert run(*base, out, "--full", "--lora", 4).error.startswith("--lora is of an adapter, and --full trains all")
    assert run(*base, data).error == f"{data} is a file: give a folder that is new or empty"
    assert run(*base, tmp_path / "no" / "out").error.startswith(f"no such folder: {tmp_path / 'no'}")
    assert run(*base, tmp_path).error == f"{tmp_path} is there already and not empty: give another folder"
    assert run(*base, out, "--resume").error.startswith(f"no state.safetensors in {out}")
    assert run("finetune", folder, "--data", tmp_path / "none", "--out", out).error.endswith(
        "No such file or directory"
    )
    error = run(*base, out, "--template", "v9").error
    assert error.startswith("no template is called 'v9'")
    assert error.count("no template") == 1
    bare = make_folder(tmp_path / "bare", tokenizer=False)
    error = run("finetune", bare, "--data", data, "--out", out).error
    assert error.startswith(f"no tokenizer in {bare}")
    assert error.count("no tokenizer") == 1
    data.write_text('{"text": "a"}\n{"text": 1}\n', encoding="utf-8")
    assert run(*base, out).error == f"{data}:2: text must be a text, not 1"
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="without locks of folders")
def test_two_runs_into_one_folder(run: Command, data: Path, tmp_path: Path) -> None:
    """The second one would write over the files of the first, and take its half-written ones away."""
    folder, out = make_folder(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    words = ("finetune", folder, "--data", data, "--out", out, "--seq_len", 64, "--steps", 1)
    with locked_folder(out, "the first"):
        assert "another finetune writes into it" in run(*words).err
    assert run(*words).text == f"{out}\n"
