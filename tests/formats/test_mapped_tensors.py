"""Mapped tensors: the file's bytes, writable without touching it, in memory when said to be, few files open."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral.formats import mapped_tensors, weights
from mistral.formats.gguf import open_gguf
from mistral.formats.gguf_header import read_gguf
from mistral.formats.mapped_tensors import Part
from mistral.formats.mistral import find_weights
from mistral.formats.weights import ITEMSIZE, WeightFiles, WeightsError
from tests.support.folders import ROOT
from tests.support.gguf_files import write_gguf

BYTES = bytes(range(256)) * 64


def files_open(path: Path) -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "bytes").write_bytes(BYTES)
    return tmp_path / "bytes"


@pytest.mark.parametrize("progress", [None, lambda nbytes: None], ids=["lazy", "at once"])
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("begin", [0, 8, 4096, 4104, 1, 4097, 8191])
def test_a_tensor_is_its_bytes(path: Path, begin: int, dtype: str, progress: Any) -> None:
    end = begin + 6 * ITEMSIZE[dtype]
    tensor = Part(path, begin, end).tensor(begin, end, (2, 3), dtype, progress)
    assert (tensor.shape, tensor.dtype) == ((2, 3), getattr(torch, dtype))
    assert tensor.flatten().view(torch.uint8).numpy().tobytes() == BYTES[begin:end]
    assert tensor.data_ptr() % ITEMSIZE[dtype] == 0
    tensor.fill_(1)
    assert (tensor == 1).all()
    assert path.read_bytes() == BYTES


def test_tensors_of_one_part_do_not_see_each_others_changes_where_they_do_not_overlap(path: Path) -> None:
    part = Part(path, 0, len(BYTES))
    one, other = (part.tensor(begin, begin + 4096, (1024,), "float32") for begin in (0, 4096))
    again = part.tensor(0, 4096, (1024,), "float32")
    one.zero_()
    assert other.view(torch.uint8).numpy().tobytes() == BYTES[4096:8192]
    assert again.data_ptr() == one.data_ptr()  # the same mapping


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)])
def test_empty_tensors(path: Path, shape: tuple[int, ...]) -> None:
    told: list[int] = []
    tensor = Part(path, 0, 8).tensor(8, 8, shape, "bfloat16", told.append)
    assert (tensor.shape, tensor.dtype, sum(told)) == (shape, torch.bfloat16, 0)


@pytest.mark.parametrize("populated", [True, False])
def test_progress_is_told_of_every_byte_once(path: Path, populated: bool) -> None:
    told: list[int] = []
    with (
        mock.patch.object(mapped_tensors, "PIECE", 5000),
        mock.patch.object(mapped_tensors, "_populate", return_value=populated),
    ):
        tensor = Part(path, 0, len(BYTES)).tensor(2, 12002, (6000,), "bfloat16", told.append)
    assert told == [5000, 5000, 2000]
    assert tensor.view(torch.uint8).numpy().tobytes() == BYTES[2:12002]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_is_open_once_for_a_part_and_not_for_ever(path: Path) -> None:
    part = Part(path, 0, len(BYTES))
    assert files_open(path) == 0
    tensors = [part.tensor(4 * i, 4 * i + 4, (1,), "float32") for i in range(50)]
    assert files_open(path) == 1
    del tensors
    gc.collect()
    assert files_open(path) == 0


def test_adjacent_tensors_share_parts(tmp_path: Path) -> None:
    state = {f"{i}": torch.full((100,), float(i)) for i in range(20)}
    state["8"] = torch.full((5000,), 8.0)  # larger than a part
    save_file(state, tmp_path / "consolidated.safetensors")
    with mock.patch.object(weights, "PART", 4000):
        found = find_weights(tmp_path)
    for name, tensor in load_file(tmp_path / "consolidated.safetensors").items():
        assert torch.equal(found.get(name), tensor)
    parts = {id(reader.part): reader.part for reader in found.readers.values()}  # type: ignore[attr-defined]
    sizes = sorted(part.end - part.begin for part in parts.values())
    assert sizes[-1] == 20_000
    assert sizes[-2] <= 4000
    assert len(sizes) <= 6


def test_tensors_are_read_in_the_files_order(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
        for name, at in zip("abc", (2, 0, 1), strict=True)
    }
    text = json.dumps(header).encode()
    (tmp_path / "consolidated.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    assert list(find_weights(tmp_path).readers) == ["b", "c", "a"]


# --- files that change


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Path, WeightFiles]:
    path = tmp_path / "consolidated.safetensors"
    save_file({"a": torch.ones(100_000), "b": torch.ones(100_000)}, path)
    return path, find_weights(tmp_path)


def test_a_file_that_became_shorter(opened: tuple[Path, WeightFiles]) -> None:
    path, found = opened
    os.truncate(path, path.stat().st_size - 1)
    for progress in (None, lambda nbytes: None):
        with pytest.raises(
            WeightsError, match=f"a cannot be read: {path} has become shorter since its header was read"
        ):
            found.get("a", progress)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system kills the process")
def test_a_file_that_became_shorter_once_it_was_mapped(opened: tuple[Path, WeightFiles]) -> None:
    path, found = opened
    kept = found.get("a")
    if not mapped_tensors._populate(mmap.mmap(-1, 4096), 0, 4096):
        pytest.skip("this kernel has no MADV_POPULATE_READ")
    os.truncate(path, 4096)
    with pytest.raises(WeightsError, match="b cannot be read: .*(Bad address|Errno 14)"):
        found.get("b", lambda nbytes: None)
    assert kept.shape == (100_000,)


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_file_that_another_took_the_place_of(tmp_path: Path, form: str) -> None:
    """A fetch that runs meanwhile puts a file there whose tensors may begin elsewhere: their bytes are numbers too."""
    path, other = tmp_path / f"consolidated.{form}", tmp_path / "other"
    if form == "gguf":
        write_gguf(path)
        found, name = open_gguf(read_gguf(path)), "output_norm.weight"
        write_gguf(other, extra={"general.name": "x" * 500})
    else:
        save_file({"a": torch.ones(100_000), "b": torch.ones(100_000)}, path)
        found, name = find_weights(tmp_path), "b"
        save_file({"a": torch.ones(100_000), "b": torch.ones(100_000), "cc": torch.zeros(900)}, other)
    assert os.stat(other).st_size > os.stat(path).st_size
    os.replace(other, path)
    with pytest.raises(WeightsError, match=f"{name} cannot be read: .* has been written or replaced since its header"):
        found.get(name)
    assert (find_weights(tmp_path) if form == "safetensors" else open_gguf(read_gguf(path))).get(name).shape


def test_a_file_that_is_gone(opened: tuple[Path, WeightFiles]) -> None:
    path, found = opened
    path.unlink()
    with pytest.raises(WeightsError, match="b cannot be read: .*No such file"):
        found.get("b")


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_READ is Linux's")
@pytest.mark.parametrize(("number", "touched"), [(errno.EINVAL, 1), (errno.EFAULT, 0)])
def test_an_older_kernel_has_pages_touched(path: Path, number: int, touched: int) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(number, "no")

    part = Part(path, 0, len(BYTES))
    with mock.patch.object(mapped_tensors.mmap, "mmap", Mapping), mock.patch.object(mapped_tensors, "touch") as touch:
        if touched:
            part.tensor(0, 4096, (1024,), "float32", lambda nbytes: None)
        else:
            with pytest.raises(OSError, match="no"):
                part.tensor(0, 4096, (1024,), "float32", lambda nbytes: None)
    assert touch.call_count == touched


# --- memory

RESIDENT = """
import sys
from pathlib import Path
from mistral.formats import mapped_tensors

def resident():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024

import torch
path, size = Path(sys.argv[1]), Path(sys.argv[1]).stat().st_size
mapped_tensors.Part(path, 0, 4096).tensor(0, 4096, (4096 // 4,), "float32", lambda n: None)  # what torch needs once
for how in ("lazy", "populated", "touched"):
    if how == "touched":
        mapped_tensors._populate = lambda *_: False
    before = resident()
    progress = None if how == "lazy" else lambda nbytes: None
    tensor = mapped_tensors.Part(path, 0, size).tensor(0, size, (size // 4,), "float32", progress)
    print(resident() - before)
    del tensor
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")
def test_what_is_said_to_be_in_memory_is(tmp_path: Path) -> None:
    size = 50_000_000
    (tmp_path / "large").write_bytes(bytes(size))
    words = [sys.executable, "-c", RESIDENT, str(tmp_path / "large")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lazy, populated, touched = map(int, done.stdout.split())
    assert lazy < size / 2
    assert size * 0.95 < populated < size * 1.3
    assert size * 0.95 < touched < size * 1.3
