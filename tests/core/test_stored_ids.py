"""Ids in a file: the same as in a list, in the memory of a piece; and files that are refused."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mistral import stored_ids
from mistral.engine import Engine
from mistral.generate import complete, encode_prompts
from mistral.sampling_params import SamplingParams
from mistral.stored_ids import StoredIds
from mistral.util.errors import FormatError
from tests.support.tiny import tiny_args, tiny_model


def stored(path: Path, ids: list[int], dtype: str = "<u2") -> StoredIds:
    np.save(path, np.array(ids, dtype))
    return StoredIds(path)


@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<i8", "u1"])
def test_they_are_a_sequence(tmp_path: Path, dtype: str) -> None:
    ids = [(7 * i) % 101 for i in range(1000)]
    found = stored(tmp_path / "ids.npy", ids, dtype)
    assert len(found) == 1000
    assert list(found) == ids
    assert list(reversed(found)) == ids[::-1]
    for at in (
        slice(None),
        slice(3, 9),
        slice(-5, None),
        slice(9, 3),
        slice(0, 5000),
        slice(2, 20, 3),
        slice(9, 3, -1),
    ):
        assert found[at] == ids[at]
    assert (found[0], found[-1], found[999]) == (ids[0], ids[-1], ids[999])
    assert all(type(i) is int for i in found[:3])
    with pytest.raises(IndexError, match="1000"):
        found[1000]


def test_a_prompt_in_a_file_is_that_prompt(tmp_path: Path) -> None:
    class Plain:
        bos_id, eos_id = 1, -1

        def encode(self, s: str) -> list[int]:
            raise AssertionError("prompts are ids")

        def decode(self, t: list[int]) -> str:
            return " ".join(map(str, t))

    model = tiny_model(tiny_args())
    ids = [3 + (5 * i) % 50 for i in range(300)]
    found = stored(tmp_path / "ids.npy", ids)
    assert encode_prompts([found], Plain()) == [found]
    here = complete([found], model, Plain(), max_tokens=9, temperature=0, repetition_penalty=1.2)
    there = complete([ids], model, Plain(), max_tokens=9, temperature=0, repetition_penalty=1.2)
    assert here[0].text == there[0].text
    assert here[0].prompt_tokens is found


def test_memory_does_not_grow_with_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_ids, "BLOCK", 512)
    model = tiny_model(tiny_args(dim=8, head_dim=2, hidden_dim=8, sliding_window=64))

    def most(length: int) -> int:
        found = stored(tmp_path / f"{length}.npy", [5] * length)
        engine = Engine(model, eos_ids=(), chunk_size=2000)
        gc.collect()
        gc.freeze()  # so that only what is new is looked through after every step
        tracemalloc.start()
        engine.add(found, SamplingParams(max_tokens=1, temperature=0))
        while not engine.done:
            engine.step()
            gc.collect()  # when it comes by itself depends on what ran before
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.unfreeze()
        return peak

    most(4_000)
    # A list of them would take 320,000; what the interpreter keeps of its own varies by some 16,000.
    assert most(40_000) < most(4_000) + 100_000


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    with pytest.raises(FormatError, match=r"ids.npy cannot be read as a .npy file: .*No such file"):
        StoredIds(path)
    for array, error in (
        (np.zeros((2, 3), np.int32), r"holds int32 \[2, 3\]; it must be one dimension"),
        (np.zeros(3), "holds float64"),
        (np.array(["a"]), "one dimension of whole numbers"),
        (np.array([True]), "holds bool"),
        (np.array([{}], object), "holds object"),
    ):
        np.save(path, array)
        with pytest.raises(FormatError, match=error):
            StoredIds(path)
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="792 bytes of ids, but 800 are needed"):
        StoredIds(path)
    path.write_bytes(b"not an array")
    with pytest.raises(FormatError, match="cannot be read as a .npy file"):
        StoredIds(path)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    engine = Engine(tiny_model(tiny_args()), eos_ids=())
    with pytest.raises(ValueError, match="the id 61, outside the vocabulary of 61"):
        engine.add(stored(tmp_path / "ids.npy", [3] * 70_000 + [61]), SamplingParams())
