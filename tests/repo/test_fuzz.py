"""Broken files end in a model that loads or in one clear error, and the tool that says so notices when they do not."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mistral.formats.mistral import ParamsError
from mistral.loader import load as loading

if sys.platform == "win32":
    pytest.skip("the tool is for Linux and macOS", allow_module_level=True)

from tools.fuzz import __main__ as command
from tools.fuzz.kinds import KINDS, make_case, prepare
from tools.fuzz.watch import Outcome, watch


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "watch", partial(watch, limit=100))  # a machine may be so busy
    code = command.main(["--mutations", "117", "--keep", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0, out
    titles, *rows = (line.split() for line in out.splitlines())
    assert titles == ["kind", "mutations", "loaded", "refused", "violations", "slowest", "s", "peak", "memory"]
    assert [row[:2] for row in rows] == [*([kind, "13"] for kind in KINDS), ["all", "117"]]
    for row in rows:
        assert int(row[2]) + int(row[3]) == int(row[1])
    assert int(rows[-1][3]) > int(rows[-1][2]) > 5  # most are refused, but not what is sound
    assert not list(tmp_path.iterdir())


def test_a_case_is_made_again(tmp_path: Path) -> None:
    prepare(tmp_path)
    for kind, about in KINDS.items():
        good = (tmp_path / "good" / kind / about.file).read_bytes()
        first = [make_case(tmp_path, kind, 7, i)[0] / about.file for i in range(20)]
        made = [path.read_bytes() for path in first]
        assert made == [about.mutate(random.Random(f"7 {kind} {i}"), good) for i in range(20)]
        assert len({good, *made}) > 15


# --- mutants


def not_ours() -> None:
    raise KeyError("dim")


def an_error_of_a_library() -> None:
    json.loads("{")


def a_long_line() -> None:
    raise ParamsError("word " * 200)


def no_line() -> None:
    raise ParamsError(" ")


def colours() -> None:
    raise ParamsError("\x1b[31mred")


def code_from_the_file() -> None:
    Path("ran").mkdir()


def a_warning() -> None:
    warnings.warn("oh", stacklevel=1)


def print_as_c_does() -> None:
    os.write(2, b"LOG(ERROR)\n")


def memory() -> None:
    bytearray(1_150_000_000)


def a_crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def a_hang() -> None:
    time.sleep(600)


def nothing() -> None:
    pass


MUTANTS: dict[Callable[[], None], str] = {
    not_ours: "load: KeyError",
    an_error_of_a_library: "load: JSONDecodeError",
    a_long_line: "characters: error: word word",
    no_line: "not one line",
    colours: "",  # escape sequences are shown, not obeyed
    code_from_the_file: "files appear: here/ran",
    a_warning: "prints: ",
    print_as_c_does: "prints: LOG(ERROR)",
    memory: "takes 1,1",
    a_crash: "dies of SIGSEGV: Fatal Python error",
    a_hang: "in a_hang",
    nothing: "",
}


def plant() -> None:
    """Have `load` make the mistake that the number of the case names."""
    good = loading.read_folder

    def read_folder(folder: Path, *rest: int) -> object:
        list(MUTANTS)[int(folder.name.rpartition("-")[2])]()
        return good(folder, *rest)

    loading.read_folder = read_folder  # type: ignore[assignment]


@pytest.mark.long
@pytest.mark.parametrize(
    ("mistakes", "limit"),
    [
        pytest.param([mistake for mistake in MUTANTS if mistake is not a_hang], 100, id="at once"),
        pytest.param([a_hang, nothing], 15, id="a hang"),
    ],
)
def test_planted_mistakes_are_noticed(mistakes: list[Callable[[], None]], limit: float, tmp_path: Path) -> None:
    """One after the other: what comes after a crash or a hang is as it would be alone."""
    cases = [("params", list(MUTANTS).index(mistake)) for mistake in mistakes]
    for mistake, outcome in zip(mistakes, watch(cases, tmp_path, 0, limit=limit, plant=plant), strict=True):
        if said := MUTANTS[mistake]:
            assert len(outcome.violations) == 1
            assert said in outcome.violations[0]
        else:
            assert not outcome.violations
        assert (outcome.folder / "params.json").is_file()  # to be kept


def test_violations_are_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "header-3-17"
    folder.mkdir()
    (folder / "consolidated.safetensors").write_text("broken")
    outcome = Outcome("header", 17, False, ("load: KeyError",), (), 0.25, 2_500_000, folder)
    monkeypatch.setattr(command, "watch", lambda cases, home, seed: [outcome for _ in cases])
    assert command.main(["--seed", "3", "--only", "header", "--number", "17", "--keep", str(tmp_path / "kept")]) == 1
    shown = capsys.readouterr().out.splitlines()
    kept = tmp_path / "kept" / folder.name
    assert shown[:2] == [f"--seed 3 --only header --number 17  {kept}", "    load: KeyError"]
    assert shown[-1].split() == ["all", "1", "0", "0", "1", "0.25", "2.5", "MB"]
    assert (kept / "consolidated.safetensors").read_text() == "broken"


def test_no_such_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "headers"])
    assert "no kind is called 'headers': params, config, header" in capsys.readouterr().err
