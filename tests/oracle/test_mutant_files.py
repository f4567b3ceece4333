"""mutants: files of mistaken numbers, which the reader in the docs must refuse, each of them."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from mistral import cli
from mistral.oracle import pack
from mistral.oracle.mutants import MUTANTS, applies
from tests.support.folders import ROOT, make_folder

WINDOW = pack.SHIPPED / "window.safetensors"


def test_the_list(capsys):
    assert cli.main(["mutants"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(MUTANTS)
    assert all(find_mutant.what in line for find_mutant, line in zip(MUTANTS.values(), lines, strict=True))


def test_a_test_that_reads_packs_catches_every_mistake(tmp_path, capsys):
    """The twenty lines of docs/packs.md take right.npz and nothing else."""
    assert cli.main(["mutants", str(WINDOW), "-o", str(tmp_path / "made")]) == 0
    told = pack.read(WINDOW)
    files = {path.stem: path for path in (tmp_path / "made").iterdir()}
    wanted = {name for name in MUTANTS if applies(name, told.args, [len(p) for p in told.prompts])}
    assert set(files) == {"right", *wanted}
    assert len(wanted) > 20
    reader = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "packs.md").read_text(), re.S)[0]
    # One process for all of them: the reader's own lines, over and over.
    loop = f"import sys\nfor f in sys.argv[2:]:\n  sys.argv = [sys.argv[0], sys.argv[1], f]\n  exec({reader!r})\n"
    names = sorted(files)
    given = [str(WINDOW), *(str(files[name]) for name in names)]
    done = subprocess.run([sys.executable, "-c", loop, *given], capture_output=True, text=True, check=True)
    verdicts = [line for line in done.stdout.splitlines() if line.startswith("beyond")]
    assert len(verdicts) == len(names)
    passed = [name for name, line in zip(names, verdicts, strict=True) if line.endswith("rows []")]
    assert passed == ["right"]


def test_one_mistake_and_prompts_of_a_file(tmp_path):
    folder = make_folder(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("[1, 2, 3, 4, 5, 6, 7, 8, 9]\n")
    words = ["--mutant", "window_one_more", "--file", str(tmp_path / "p.jsonl")]
    assert cli.main(["mutants", str(folder), "-o", str(tmp_path / "made"), *words]) == 0
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"right.npz", "window_one_more.npz"}
    right, wrong = (np.load(tmp_path / "made" / f"{name}.npz") for name in ("right", "window_one_more"))
    assert right["prompt_ids"].tolist() == list(range(1, 10))
    assert right["prompt_lens"].tolist() == [9]
    apart = np.abs(right["logprobs"] - wrong["logprobs"]).max(1)
    assert (apart[:5] == 0).all()
    assert (apart[5:] > 1e-6).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mutant", "nothing"], "no mistake is called 'nothing'"),
        (["somewhere"], "give --output"),
        (["nowhere", "-o", "x"], "no such folder: nowhere"),
    ],
)
def test_what_is_refused(words, said, capsys):
    assert cli.main(["mutants", *words]) == 2
    assert said in capsys.readouterr().err


def test_nothing_is_made_for_prompts_that_cannot_be_asked(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("[1, 2]\n[1, 99999]\n")
    words = ["mutants", str(WINDOW), "-o", str(tmp_path / "new"), "--file", str(tmp_path / "prompts.jsonl")]
    assert cli.main(words) == 2
    assert "line 2 has the id 99999, outside the vocabulary of 61" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_place_in_ones_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["mutants", str(WINDOW), "-o", "~/made", "--mutant", "window_one_more"]) == 0
    assert {p.name for p in (tmp_path / "made").iterdir()} == {"right.npz", "window_one_more.npz"}
    assert not (tmp_path / "~").exists()


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["mutants", str(WINDOW), "-o", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == ""
