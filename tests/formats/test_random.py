"""Folders of random weights: the shape asked for, the same for the same seed, complete or not there, and they run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral.formats import random
from mistral.formats.folder import read_folder
from mistral.formats.mistral import ParamsError, to_args
from mistral.formats.releases import RELEASES
from mistral.formats.weights import WeightFiles
from mistral.generate import generate
from mistral.loader.load import load
from mistral.tokenizer import Tokenizer
from mistral.util.errors import ConvertError
from tests.support.commands import ENVIRONMENT
from tests.support.folders import PARAMS, ROOT, make_folder, write_params
from tests.support.tiny import shapes_of
from tools.random_model import ShapeError, write_random


@pytest.fixture
def params(tmp_path: Path) -> str:
    """A tiny params.json."""
    write_params(tmp_path, PARAMS)
    return str(tmp_path / "params.json")


def state_of(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shapes_and_numbers(tmp_path: Path, params: str, layout: str, dtype: str) -> None:
    written = write_random(params, tmp_path / "b", layout, dtype)
    found = read_folder(tmp_path / "b")
    assert (found.layout.to, written.dtypes) == (layout, (getattr(torch, dtype),))
    assert found.args == to_args(PARAMS)
    for name, shape in shapes_of(found.args).items():
        tensor = found.weights.get(name)
        assert tuple(tensor.shape) == shape
        if len(shape) == 1:
            assert (tensor == 1).all()
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(tensor.float().mean().item()) < 0.02 * 5 / math.sqrt(tensor.numel())
            assert len(tensor.unique(dim=0)) == shape[0]  # no row is another one's copy


@pytest.mark.long
def test_the_seed_decides(tmp_path: Path, params: str) -> None:
    for name, seed in (("b", 0), ("c", 0), ("d", 1)):
        write_random(params, tmp_path / name, seed=seed)
    b, c, d = (state_of(tmp_path / name) for name in "bcd")
    matrices = [name for name, tensor in b.items() if tensor.dim() > 1]
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert not any(torch.equal(b[name], d[name]) for name in matrices)
    flat = [b[name].flatten()[:100] for name in matrices]
    assert len({tuple(numbers.tolist()) for numbers in flat}) == len(matrices)


def test_tensors_longer_than_the_numbers_drawn(tmp_path: Path, params: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "BLOCK", 999)
    write_random(params, tmp_path / "b")
    embeddings = state_of(tmp_path / "b")["tok_embeddings.weight"]
    numbers = embeddings.flatten()
    assert numbers.numel() > 90 * 999
    assert torch.equal(numbers[:999], numbers[999:1998])
    assert len(embeddings[:300].unique(dim=0)) == 300


@pytest.mark.long
@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_names_of_releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: Any) -> None:
    """Their shapes and tokenizers; nothing so large is written."""
    seen: list[Any] = []

    def keep(folder: Any, dst: Path, layout: str) -> None:
        names = [path.name for path in folder.path.iterdir()]
        words = [Tokenizer(path).n_words for path in folder.path.iterdir()]
        seen.append((folder.args, folder.parameters, names, words))

    monkeypatch.setattr("tools.random_model.write_folder", keep)
    monkeypatch.setattr(random, "BLOCK", 99)
    for name in (release.name, release.variants[-1].upper()):
        write_random(name, tmp_path / "b")
    (args, count, names, words), again = seen
    assert again[0] == args
    assert all(
        getattr(args, size) == getattr(release, size) for size in ("dim", "n_layers", "hidden_dim", "rope_theta")
    )
    assert count == sum(math.prod(shape) for shape in shapes_of(args).values())
    if release.tokenizer_kind == "tekken" and release.template != "v3-tekken":
        assert names == []  # mistral-common has none of that version
    else:
        assert names == [release.tokenizer_file]
        assert words == [release.vocab_size - release.added_words]


def test_the_tokenizer_beside_params_is_taken_along_and_the_folder_runs(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    written = write_random(str(folder / "params.json"), tmp_path / "b")
    assert sorted(path.name for path in written.path.iterdir()) == [
        "consolidated.safetensors",
        "params.json",
        "tokenizer.model",
    ]
    loaded = load(written.path, device="cpu")
    texts, logprobs = generate(["Hello"], loaded.model, loaded.tokenizer, max_tokens=3, temperature=0)
    assert len(texts) == 1
    assert all(math.isfinite(value) for value in logprobs[0])


def test_what_cannot_be_written(tmp_path: Path, params: str) -> None:
    with pytest.raises(ShapeError, match="no release is called '8B v0.1': .* one of 7B v0.1, 7B v0.2, "):
        write_random("8B v0.1", tmp_path / "b")
    with pytest.raises(ParamsError, match="cannot be read"):
        write_random(str(tmp_path / "none.json"), tmp_path / "b")
    little = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=14_000_000_000))
    with little, pytest.raises(ConvertError, match=r"b needs 14\.5 GB, but its disk has 14\.0 GB free"):
        write_random("7B v0.1", tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConvertError, match="there already and not empty"):
        write_random(params, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "params.json"]


def test_a_run_that_is_broken_off_leaves_nothing(tmp_path: Path, params: str) -> None:
    with mock.patch.object(WeightFiles, "get", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_random(params, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["params.json"]


@pytest.mark.long
def test_the_command(tmp_path: Path, params: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.random_model", *words]
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)

    done = run(params, str(tmp_path / "b"), "--layout", "hf", "--dtype", "float32", "--seed", "3")
    assert (done.returncode, done.stderr) == (0, "")
    first, *notes = done.stdout.splitlines()
    assert first == f"wrote {tmp_path / 'b'}: Hugging Face's layout, 828.4 kB of float32 in model.safetensors"
    assert notes[-1] == f"note: {tmp_path / 'b'} has no tokenizer: copy the release's into it"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"
    done = run("9B", str(tmp_path / "c"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no release is called '9B'")
    assert len(done.stderr.splitlines()) == 1
