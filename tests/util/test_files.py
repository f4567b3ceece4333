"""Small files that are not small are refused before they are read; files and folders appear whole or not at all."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral.chat import session
from mistral.formats.huggingface import find_hf_weights
from mistral.formats.mistral import read_object
from mistral.tekken import tekken_words
from mistral.tokenizer import Tokenizer
from mistral.util.errors import FormatError
from mistral.util.files import Lines, folder_atomic, read_limited, reason_of, regular, require_writable, write_atomic


def test_the_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    assert read_limited(path, 4) == b"1234"
    with pytest.raises(OSError, match="it has more than 3 bytes, which no such file has"):
        read_limited(path, 3)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("params.json", read_object),
        ("model.safetensors.index.json", lambda path: find_hf_weights(path.parent)),
        ("tekken.json", tekken_words),
        ("tokenizer.model", Tokenizer),
        ("talk.json", session._read),
    ],
)
def test_each_of_them(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(10**12)  # a hole: it takes no disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=name) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 10**8
    finally:
        tracemalloc.stop()
    assert type(error.value).__module__.startswith("mistral.")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(OSError, match="it is the pointer that Git LFS leaves in its place: run git lfs pull"):
        read_limited(path)


# --- files that appear whole or not at all


def stop(path: Path, error: type[BaseException]) -> None:
    path.write_text("half")
    raise error


def failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_dash_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not stdin or stdout: no file of that name appears, and what is missing is no file of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match="- cannot be written: a name of a file is needed here"):
        require_writable("-")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError) as told:
        read_limited(Path("-"))
    assert reason_of(told.value) == "a name of a file is needed here, and - is not stdin"


def test_a_file_is_new_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), write_atomic(path) as beside:
            stop(beside, error)
        assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, failing)
            with (
                pytest.raises(FormatError, match=f"{path} cannot be written: No space left"),
                write_atomic(path) as beside,
            ):
                beside.write_text("new")
        assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])
    with write_atomic(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert (path.read_text(), list(tmp_path.iterdir())) == ("new", [path])


def test_bytes_are_on_the_disk_before_a_file_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    with write_atomic(tmp_path / "file") as beside:
        beside.write_text("new")
    assert order == ["fsync", "replace"]
    order.clear()
    with folder_atomic(tmp_path / "folder") as work:
        (work / "a").write_text("a")
        (work / "b").write_text("b")
    assert order == ["fsync"] * 3 + ["rename", "fsync"]  # both files, the folder; then the folder it is in


@pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX's")
def test_modes_and_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with write_atomic(tmp_path / "link") as beside:
        beside.write_text("new")
        beside.chmod(0o600)  # as some libraries leave it
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    (tmp_path / "plain").touch()
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="devices are POSIX's")
def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "": "the name is empty",
        ".": "folder",
        "loop": "symbolic links|no file",
        "pipe": "no file",
        "none/x": "No such file",
    }
    for name, reason in reasons.items():
        path = tmp_path / name if name else ""
        for refuse in (require_writable, lambda path: write_atomic(path).__enter__()):
            with pytest.raises(FormatError, match=f"cannot be written: .*({reason})"):
                refuse(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "pipe"]
    with pytest.raises(FormatError, match="cannot be written: its name has a character that no name can have"):
        require_writable("a\0b")


def test_a_file_that_can_be_written_is_not(tmp_path: Path) -> None:
    require_writable(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_complete_or_not_there(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), folder_atomic(tmp_path / "folder") as work:
            stop(work / "a", error)
        assert not list(tmp_path.iterdir())
    with folder_atomic(tmp_path / "folder") as work:
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder").is_dir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "params.json")
    with pytest.raises(OSError, match="it is no file, but a pipe or a device"):
        read_limited(tmp_path / "params.json")
    with pytest.raises(IsADirectoryError), open(tmp_path, "rb", opener=regular):
        pass
    (tmp_path / "file").write_bytes(b"1234")
    with open(tmp_path / "file", "rb", opener=regular) as file:
        assert file.read() == b"1234"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lines_of_a_pipe_in_any_encoding(encoding: str) -> None:
    """A pipe cannot be read again: the mark is looked at, and not gone back over."""
    read, write = os.pipe()
    with os.fdopen(write, "wb") as end:
        end.write("a\u2028\u00e9\r\nb".encode(encoding))
    with os.fdopen(read, "rb") as file:
        assert list(Lines(file, "it")) == ["a\u2028\u00e9\r\n".encode(), b"b"]
