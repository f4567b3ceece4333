"""Files of tensors on a disk that has no room: the system's reason in an error of ours, whatever writes them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistral.formats.adapter_forms import convert_adapter
from mistral.formats.writer import save_tensors
from mistral.oracle import arrays
from mistral.train import state
from mistral.util.errors import MistralError
from tests.support.adapters import write_peft
from tests.support.folders import make_folder

TENSORS = {"a": torch.zeros(10_000)}
NO_ROOM = os.strerror(27)  # EFBIG, which the limit below gives; a full disk gives ENOSPC in the same way


@contextmanager
def no_room(most: int) -> Iterator[None]:
    """Files of at most so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def convert(place: Path) -> None:
    folder = make_folder(place / "base")
    adapter = write_peft(place / "lora")
    with no_room(1000):
        convert_adapter(adapter, place / "out", "mistral", base=folder)


def trace(place: Path) -> None:
    with no_room(1000):
        arrays.write(place / "out", TENSORS, {})


def train(place: Path) -> None:
    with no_room(1000):
        state.save_tensors(place / "out", TENSORS)


@pytest.mark.parametrize("door", [convert, trace, train], ids=lambda door: str(door.__name__))
def test_a_full_disk_is_an_error_with_the_reason(door: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(MistralError) as told:
        door(tmp_path)
    assert str(told.value).endswith(f"out {'was not' if door is convert else 'cannot be'} written: {NO_ROOM}")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_any_strides_are_written(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"t": torch.arange(6.0).reshape(2, 3).T})
    assert load_file(tmp_path / "a")["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
