"""Calibration: the mean squares of what products are given, and `convert --calibrate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistral.formats.folder import read_folder
from mistral.loader import calibration
from mistral.loader.calibration import FLOOR, LEAST, calibrate, mean_squares
from mistral.loader.load import load
from mistral.parameters import parameters
from mistral.util.errors import UsageError
from tests.support.commands import in_process
from tests.support.folders import make_folder
from tests.support.tiny import tiny_args, tiny_model

TEXT = "Once upon a time there lived a king who had three daughters and one son. " * 40


def test_mean_squares_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SEQUENCE", 7)
    model = tiny_model(tiny_args(sliding_window=3))
    ids = [i % model.args.vocab_size for i in range(3, 18)]  # two sequences, and a token that is left over
    done: list[int] = []
    found = mean_squares(model, ids, done.append)
    assert sum(done) == 15
    assert found.keys() == {name for name, p in parameters(model.args).items() if p.role == "matrix"}
    rows = []
    with torch.inference_mode():
        for first in (0, 7):
            h = model.tok_embeddings(torch.tensor(ids[first : first + 7]))
            rows.append(model.layers[0].attention_norm(h))
    mean = torch.cat(rows).square().mean(0)
    torch.testing.assert_close(found["layers.0.attention.wq.weight"], mean + FLOOR * mean.mean())
    assert torch.equal(found["layers.0.attention.wq.weight"], found["layers.0.attention.wk.weight"])
    assert found["layers.1.feed_forward.w2.weight"].shape == (model.args.hidden_dim,)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_convert(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    folder, text = make_folder(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["convert", folder, tmp_path / "few", "--to", "mistral", "--quant", "int4"]
    done = cli(*words, "--calibrate", text)
    assert done.code == 0
    assert "note: int4 was calibrated on the " in done.err
    assert cli(*words[:2], tmp_path / "plain", *words[3:]).code == 0
    packed = [load(tmp_path / name, device="cpu").model.layers[0].attention.wq.packed for name in ("few", "plain")]
    assert packed[0].shape == packed[1].shape
    assert not torch.equal(*packed)
    columns, _ = calibrate(read_folder(folder), text)
    name = "layers.0.attention.wq.weight"
    weight = read_folder(folder).weights.get(name).float()
    errors = [
        (
            (load(tmp_path / few, device="cpu").model.layers[0].attention.wq.rows(0, len(weight)) - weight).square()
            * columns[name]
        ).sum()
        for few in ("few", "plain")
    ]
    assert errors[0] < errors[1]


def test_what_cannot_be_calibrated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    folder, text = make_folder(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Once.")
    new = tmp_path / "new"
    for words, error in (
        (["--quant", "int4", "--calibrate", text], f"{text} has "),
        (["--quant", "int4", "--calibrate", tmp_path / "none"], f"{tmp_path / 'none'} cannot be read: No such file"),
        (["--quant", "int8", "--calibrate", text], "--calibrate is for --quant int4"),
        (["--calibrate", text], "--calibrate is for --quant int4"),
    ):
        done = cli("convert", folder, new, "--to", "mistral", *words)
        assert done.code == 2
        assert done.error.startswith(error)
        assert not new.exists()
    with pytest.raises(UsageError, match=f"calibration needs {LEAST} or more"):
        calibrate(read_folder(folder), text)
