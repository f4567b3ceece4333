"""Layouts are rows of one table: nothing else knows them by name, and a third one is a row more."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mistral
from mistral.args import ModelArgs
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.inspect_text import as_text
from mistral.formats.layout import Layout, ParamsError, Serving
from mistral.formats.layouts import LAYOUTS, NATIVE, WRITABLE, find_layout
from mistral.formats.mistral import to_args
from mistral.formats.weights import Reader, WeightFiles, open_safetensors
from mistral.loader.load import load
from tests.support.folders import PARAMS, make_folder, random_state

PACKAGE = Path(mistral.__file__).parent
NAMES = {*LAYOUTS, *WRITABLE, *(layout.config for layout in LAYOUTS.values())}


def comparisons(source: str) -> Iterator[str]:
    """Comparisons with a layout's name, or choices by it."""
    for node in ast.walk(ast.parse(source)):
        sides: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Dict):
            sides = list(node.keys)
        for side in sides:
            inner = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            if any(isinstance(one, ast.Constant) and one.value in NAMES for one in inner):
                yield ast.unparse(node)


def test_no_layout_is_known_by_name() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    found = {str(path.relative_to(PACKAGE)): list(comparisons(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    ['x == "hf"', 'x != "mistral"', 'x in ("huggingface", "other")', '{"hf": 1}[x]', '"params.json" == x'],
)
def test_a_comparison_is_seen(line: str) -> None:
    assert list(comparisons(line))
    assert not list(
        comparisons(line.replace("hf", "of").replace("mistral", "a").replace("huggingface", "b").replace("params", "c"))
    )


def test_the_table() -> None:
    assert list(LAYOUTS) == ["mistral", "huggingface", "gguf"]
    assert list(WRITABLE) == ["mistral", "hf"]
    assert all(layout.name == name for name, layout in LAYOUTS.items())
    assert LAYOUTS["mistral"] is NATIVE


# --- another one, of one file, as another program might have it


class OneFile(Layout):
    """All of a model in one file, with names and an order of rows of its own."""

    name, title, config = "one-file", "one file", "model.one"

    def has_config(self, path: Path) -> bool:
        return self.has_weights(path)

    def has_weights(self, path: Path) -> bool:
        return path.suffix == ".one" or (path / self.config).is_file()

    def weight_sets(self, names: Collection[str]) -> list[tuple[str, ...]]:
        return [(self.config,)]

    def read_config(self, path: Path) -> dict[str, Any]:
        return dict(PARAMS)

    def to_args(self, raw: dict[str, Any], max_batch_size: int = 0) -> tuple[ModelArgs, list[str]]:
        return to_args(raw, max_batch_size), ["its shape was guessed"]

    def find_weights(self, path: Path) -> WeightFiles:
        return open_safetensors((path if path.is_file() else path / self.config,))

    def name_of(self, name: str) -> str:
        return name.replace("layers", "blk")

    def ignores(self, stored: str) -> bool:
        return stored == "extra"

    def fix(self, name: str, args: ModelArgs, reader: Reader) -> Reader:
        return (lambda progress=None: reader(progress).flip(0)) if name.endswith("wv.weight") else reader

    def serving(self, path: Path, args: ModelArgs, files: tuple[Path, ...]) -> Serving:
        return Serving("", "vLLM does not know it")


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, OneFile.name, OneFile())


def write_one(folder: Path) -> dict[str, torch.Tensor]:
    make_folder(folder)
    for name in ("params.json", "consolidated.safetensors"):
        (folder / name).unlink()
    state = random_state(3)
    stored = {k.replace("layers", "blk"): w.flip(0) if k.endswith("wv.weight") else w for k, w in state.items()}
    save_file({**stored, "extra": torch.ones(2)}, folder / OneFile.config)
    return state


def test_a_third_row_is_all_it_takes(tmp_path: Path, third: None) -> None:
    state = write_one(tmp_path / "a")
    loaded = load(tmp_path / "a", device="cpu")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert loaded.notes[0] == "its shape was guessed"
    report = inspect_folder(tmp_path / "a")
    assert report["layout"] == "one-file"
    assert "one file: model.one" in as_text(report)
    convert(tmp_path / "a", tmp_path / "b", "mistral")
    assert torch.equal(load(tmp_path / "b", device="cpu").model.output.weight, state["output.weight"])


def test_a_layout_may_be_a_single_file(tmp_path: Path, third: None) -> None:
    state = write_one(tmp_path / "a")
    found = read_folder(tmp_path / "a" / OneFile.config)
    assert found.layout.name == "one-file"
    assert torch.equal(found.weights.get("layers.0.attention.wv.weight"), state["layers.0.attention.wv.weight"])


def test_which_layout_a_folder_has(tmp_path: Path, third: None) -> None:
    with pytest.raises(ParamsError, match="no params.json and no config.json and no .gguf file and no model.one in"):
        find_layout(tmp_path)
    shutil.copy(make_folder(tmp_path / "a") / "params.json", tmp_path)
    assert find_layout(tmp_path) == (NATIVE, [])  # a shape without weights is still a shape
    (tmp_path / "model.one").touch()
    assert find_layout(tmp_path)[0].name == "one-file"  # what is complete comes first
    (tmp_path / "consolidated.safetensors").touch()
    assert find_layout(tmp_path) == (
        NATIVE,
        ["the folder holds several layouts: Mistral's was read, one file was ignored"],
    )


@pytest.mark.parametrize("inside", [("checkpoint-500",), ("snapshots/0f3a",), ("checkpoint-1", "checkpoint-2")])
def test_models_within_a_folder_that_is_none_are_named(tmp_path: Path, inside: tuple[str, ...]) -> None:
    for name in inside:
        make_folder(tmp_path / "run" / name)
    with pytest.raises(ParamsError) as error:
        find_layout(tmp_path / "run")
    asked = "that" if len(inside) == 1 else "one of them"
    assert str(error.value).endswith(f"; within it there is {', '.join(inside)}: give {asked}")
    with pytest.raises(ParamsError, match="weights and a tokenizer$"):
        find_layout(tmp_path)
