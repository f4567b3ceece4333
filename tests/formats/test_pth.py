"""`.pth` files that would take memory, or call something: refused by their archive, before PyTorch opens them."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.formats.mistral import find_weights
from mistral.formats.pth import ArchiveError, check_archive
from mistral.formats.weights import WeightsError


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def records(state: Any) -> dict[str, bytes]:
    out = io.BytesIO()
    torch.save(state, out)
    with zipfile.ZipFile(out) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def refused(path: Path, said: str) -> None:
    with pytest.raises(ArchiveError, match=said):
        check_archive(path)
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))} cannot be loaded as plain tensors: .*{said}"):
        find_weights(path.parent)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    return tmp_path / "consolidated.00.pth"


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16).t()},
        torch.nn.Linear(2, 3).state_dict(),
        {"a": torch.nn.Parameter(torch.ones(3))},
    ],
    ids=["tensors", "state_dict", "parameter"],
)
def test_what_torch_saves_is_taken(pth: Path, state: Any) -> None:
    torch.save(state, pth)
    check_archive(pth)
    assert list(find_weights(pth.parent).tensors) == list(state)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(bytearray, 1 << 40), "(__builtin__|builtins)\\.bytearray"),
        (Call(Counter, "ab"), "collections\\.Counter"),
        (Call(torch.Tensor, 40_000, 50_000), "torch(\\._tensor)?\\.\\w*Tensor"),
    ],
    ids=["bytearray", "Counter", "Tensor"],
)
def test_what_asks_for_memory(pth: Path, call: Call, name: str) -> None:
    torch.save({"a": torch.ones(3), "b": call}, pth)
    refused(pth, f"it asks for {name}, which is code and was not run")


def test_any_pickle_is_looked_at(pth: Path) -> None:
    good = records({"a": torch.ones(3)})
    (root,) = {name.partition("/")[0] for name in good}
    write(pth, {**good, f"{root}/DATA.PKL": pickle.dumps(Call(bytearray, 1 << 40), protocol=2)})
    refused(pth, "bytearray, which is code")


def test_what_unpacks_to_more(pth: Path) -> None:
    state = records({"a": torch.ones(1000)})
    write(pth, state)
    check_archive(pth)
    write(pth, state, zipfile.ZIP_DEFLATED)
    refused(pth, "it is compressed, which torch.save does not do")


def test_a_size_that_is_a_lie(pth: Path) -> None:
    write(pth, records({"a": torch.ones(1000)}))
    raw = bytearray(pth.read_bytes())
    place = raw.rindex(b"PK\x01\x02") + 20  # of the last record, in the directory: both its sizes
    raw[place : place + 8] = (2**31).to_bytes(4, "little") * 2
    pth.write_bytes(raw)
    refused(pth, "compressed")


def test_a_pickle_that_is_long(pth: Path) -> None:
    good = records({"a": torch.ones(3)})
    name = next(name for name in good if name.endswith("/data.pkl"))
    write(pth, {**good, name: b"\x80\x02" + b"]" * 10_000_000})
    refused(pth, "its pickle has 10,000,002 bytes")


@pytest.mark.parametrize("broken", [b"\x80\x02", b"\xff", b"c\xff\n\n.", b"", b"\x80\x02X\xff\xff\xff\x7f"])
def test_a_pickle_that_is_broken(pth: Path, broken: bytes) -> None:
    good = records({"a": torch.ones(3)})
    name = next(name for name in good if name.endswith("/data.pkl"))
    write(pth, {**good, name: broken})
    refused(pth, "it is broken \\(\\w+\\): fetch it again")


def test_nothing_is_said_on_the_way(pth: Path) -> None:
    good = records({"a": torch.ones(3)})
    (root,) = {name.partition("/")[0] for name in good}
    write(pth, {**good, f"{root}/constants.pkl": b"\x80\x02N."})  # as TorchScript's archives have it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(WeightsError, match="cannot be loaded as plain tensors"):
            find_weights(pth.parent)


def test_nested_tensors_are_none_of_a_model(pth: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, pth)
    with pytest.raises(WeightsError, match="does not hold tensors by name"):
        find_weights(pth.parent)
