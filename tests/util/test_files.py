"""Small files that are not small are refused before they are read."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral.chat import session
from mistral.formats.huggingface import find_hf_weights
from mistral.formats.mistral import read_object
from mistral.tekken import tekken_words
from mistral.tokenizer import Tokenizer
from mistral.util.files import read_limited


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
