"""Small files of a folder that are not what their names say: each is named at every door, and nothing is written with
one in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral.formats import broken
from mistral.formats.broken import broken_files, require_whole
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.loader.load import load
from mistral.util.errors import FormatError
from mistral.util.files import regular
from tests.support.folders import make_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 493443\n"
NAMES = (
    *("generation_config.json", "config.json", "params.json", "tokenizer.json", "tekken.json", "added_tokens.json"),
    *(
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "tokenizer.model",
        "tokenizer.model.v3",
    ),
    *("additional_chat_templates/tool_use.jinja", "model.safetensors.index.json", "SYSTEM_PROMPT.txt"),
)


def _pointer(path: Path) -> None:
    path.write_text(POINTER)


def _empty(path: Path) -> None:
    path.write_text(" \n")


def _page(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>404</body></html>")


def _folder(path: Path) -> None:
    path.mkdir()


def _link(path: Path) -> None:
    path.symlink_to("/nowhere/blob")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


KINDS: dict[Callable[[Path], None], str] = {
    _pointer: "cannot be read: it is the pointer that Git LFS leaves in its place: run git lfs pull",
    _empty: "is empty: fetch it again",
    _page: "is a web page, as of a download that failed: fetch it again",
    _folder: "is a folder, not a file: fetch it again",
    _link: "is a link to a file that is gone: fetch it again",
    _pipe: "cannot be read: it is no file, but a pipe or a device",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_each_is_named(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    (tmp_path / "README.md").write_text("")  # not one of them
    assert broken_files(tmp_path) == {name: f"{name} {KINDS[make]}"}
    with pytest.raises(FormatError, match="; or remove it, to convert without"):
        require_whole(tmp_path, ", to convert without")


@pytest.mark.parametrize("content", ["{", '{"a": 1', "[]", "null", '"a"', '{"a":' * 50_000, "\ufffd{}"])
def test_json_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert list(broken_files(tmp_path)) == ["generation_config.json"]
    (tmp_path / "generation_config.json").write_text('\ufeff{"a": 1}\n', encoding="utf-8")
    assert broken_files(tmp_path) == {}


def test_a_large_one_is_looked_at_from_both_ends(tmp_path: Path) -> None:
    whole = json.dumps({"model": {"vocab": {f"word{i}": i for i in range(60_000)}}})
    assert len(whole) > broken.WHOLE
    (tmp_path / "tokenizer.json").write_text(whole + "\n")
    assert broken_files(tmp_path) == {}
    (tmp_path / "tokenizer.json").write_text(whole[:-3])
    assert "cut short" in broken_files(tmp_path)["tokenizer.json"]


def test_one_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def forbidden(path: Any, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(broken, "regular", forbidden)
    assert broken_files(tmp_path) == {"config.json": "config.json cannot be read: Permission denied"}
    monkeypatch.setattr(broken, "regular", regular)
    assert broken_files(tmp_path) == {}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in each layout."""
    place = tmp_path_factory.mktemp("sound")
    ours = make_folder(place / "mistral")
    convert(ours, place / "hf", "hf")
    return {"mistral": ours, "hf": place / "hf"}


@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.json",
    ],
)
@pytest.mark.parametrize("make", [_pointer, _empty, _link], ids=lambda make: make.__name__)
def test_every_door(
    tmp_path: Path, sound: dict[str, Path], layout: str, name: str, make: Callable[[Path], None]
) -> None:
    """Loading and inspecting name it or refuse; whatever writes a folder refuses, both ways, and writes nothing."""
    folder = tmp_path / "folder"
    shutil.copytree(sound[layout], folder)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    said = f"{name} {KINDS[make]}"
    assert any(note.startswith(said) for note in read_folder(folder).notes)
    assert any(name in line for line in inspect_folder(folder)["suspicious"])
    if make is _link or name == "generation_config.json":
        loaded = load(folder, device="cpu")
        assert any(note.startswith(said) for note in loaded.notes)
        with pytest.raises(FormatError, match="or remove it"):
            loaded.save(tmp_path / "saved")
    else:  # its tokenizer cannot be known
        with pytest.raises(FormatError, match=name):
            load(folder, device="cpu")
    for to in ("mistral", "hf"):
        with pytest.raises(FormatError, match=f"{name} .*; or remove it, to convert without"):
            convert(folder, tmp_path / to, to)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_without_a_shape_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("/nowhere/blob")
    with pytest.raises(FormatError, match=r"no config.json .*; config.json is a link to a file that is gone"):
        read_folder(tmp_path)
