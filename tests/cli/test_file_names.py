"""Names of files that are no UTF-8, as Linux may have them, and names that other libraries read as more than text."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mistral.chat.templates import find_template
from mistral.cli import main
from mistral.eval.bench_text import plot
from mistral.eval.plots import draw_accuracy
from mistral.formats.folder import BUNDLED
from mistral.oracle.sides import _arrays
from mistral.serve.settings import model_name
from mistral.tokenizer import Tokenizer
from mistral.train.state import load_tensors, save_tensors
from mistral.util.files import by_utf8_name, spelled_out
from tests.support.folders import make_folder

ODD = os.fsdecode(b"k\xf6nig")
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


@only_linux
def test_training_from_and_into_such_folders(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The card and the line on stdout name them; without that a run failed when it was done."""
    folder, out, data = make_folder(tmp_path / ODD), tmp_path / f"{ODD}-out", tmp_path / f"{ODD}.jsonl"
    data.write_text(json.dumps({"prompt": "a b", "completion": " c"}) + "\n", encoding="utf-8")
    words = ["finetune", str(folder), "--data", str(data), "--out", str(out), "--seq_len", "32", "--steps", "2"]
    assert main(words) == 0
    assert capfdbinary.readouterr().out == os.fsencode(out) + b"\n"
    assert "\\udcf6" in (out / "README.md").read_text(encoding="utf-8")


@only_linux
def test_what_libraries_open_by_name(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    shutil.copy(BUNDLED / "tokenizer.model", folder)
    assert find_template(Tokenizer(folder / "tokenizer.model")).name == "v1"
    weights = {"a": torch.arange(3.0)}
    save_tensors(folder / "best.safetensors", weights)
    again = {"a": torch.zeros(3)}
    load_tensors(folder / "best.safetensors", again)
    assert torch.equal(again["a"], weights["a"])
    assert torch.equal(_arrays(folder / "best.safetensors")["a"], weights["a"])
    with by_utf8_name(folder / "tokenizer.model") as named:
        assert named.read_bytes() == (BUNDLED / "tokenizer.model").read_bytes()


def test_a_name_that_clients_can_send_back(tmp_path: Path) -> None:
    assert model_name(tmp_path / ODD) == spelled_out(ODD) == "k\\udcf6nig"
    assert model_name(tmp_path / "könig") == "könig"


@pytest.mark.parametrize("name", [ODD, "a$b_{c^$x"])
def test_pictures_have_any_name(tmp_path: Path, name: str) -> None:
    """Between two dollars matplotlib reads mathematics, and failed when all was measured."""
    row = {"tokens_mean": 8, "accuracy": 0.5, "low": 0.1, "high": 0.9}
    report = {"task": "passkey", "model": name, "n": 2, "seed": 0, "machine": "cpu", "window": 4, "reach": 8}
    draw_accuracy({**report, "rows": [row]}, str(tmp_path / "one.svg"))
    plot({"model": name, "processor": "x", "threads": 1, "torch": "2", "rows": []}, str(tmp_path / "two.svg"))
    for picture in ("one.svg", "two.svg"):
        assert spelled_out(name) in (tmp_path / picture).read_text(encoding="utf-8")
