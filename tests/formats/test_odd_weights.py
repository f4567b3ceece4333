"""Weights as others leave them: not downloaded to their end, links to nowhere, another kind of model's. The message, or
a note where they load, says what they are and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.weights import WeightsError
from mistral.loader.load import load
from mistral.util.files import unwritten
from tests.formats.test_huggingface import make_hf_folder
from tests.support.folders import BUNDLED, make_folder, random_state
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf

BIAS = torch.zeros(32)


def refused(folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_folder(folder)
    return str(error.value)


def cut_and_stretch(path: Path, at: float = 0.5) -> int:
    """Keep the beginning of a file, and give it its size again as programs do that take the room first."""
    size = path.stat().st_size
    os.truncate(path, int(size * at))
    os.truncate(path, size)
    return size


@pytest.mark.skipif(not hasattr(os, "SEEK_HOLE"), reason="this system tells of no holes")
def test_what_was_never_written_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(1_000_000))
    assert unwritten(path) == 0  # zeros, and they were written
    os.truncate(path, 3_000_000)
    if not unwritten(path):
        pytest.skip("this file system tells of no holes")
    whole = unwritten(path)
    assert 2_000_000 - 65536 <= whole <= 2_000_000
    with path.open("r+b") as file:
        file.seek(2_900_000)
        file.write(b"x")
    assert whole - 3 * 65536 <= unwritten(path) < whole  # two holes, around what is there
    assert unwritten(tmp_path) == unwritten(tmp_path / "none") == 0


@pytest.mark.parametrize("form", ["hf", "mistral", "gguf"])
def test_a_download_that_has_not_ended_is_a_note(tmp_path: Path, form: str) -> None:
    place = tmp_path / "a"
    if form == "gguf":
        args, place = gguf_args(vocab_size=4096), tmp_path / "a.gguf"
        keys = tokenizer_keys(BUNDLED / "tokenizer.model")
        write_gguf(place, args=args, extra={f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    elif form == "hf":
        make_hf_folder(place, shards=3)
    else:
        make_folder(place, random_state())
    file = read_folder(place).weights.files[0]
    before = [note for note in load(place).notes if "never written" in note]
    cut_and_stretch(file)
    if not unwritten(file):
        pytest.skip("this file system tells of no holes")
    (note,) = [note for note in load(place).notes if "never written" in note]
    assert before == []
    assert note.startswith(f"{file.name}: ")
    assert note.endswith("fetch it again")
    assert note in inspect_folder(place)["suspicious"]


@pytest.mark.parametrize("shards", [0, 3])
def test_links_to_files_that_are_gone(tmp_path: Path, shards: int) -> None:
    """A hub's cache is links, and its files may be cleaned away."""
    folder = make_hf_folder(tmp_path / "a", shards=shards, index=False)
    name = "model-00002-of-00003.safetensors" if shards else "model.safetensors"
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/0123")
    said = refused(folder)
    assert name in said
    assert said.endswith("is a link to a file that is gone: fetch it again")


def test_what_is_no_file(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert refused(folder).endswith("; model.safetensors is there, and is a folder")
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "model.safetensors")
    assert refused(folder).endswith("; model.safetensors is there, and is a pipe or a device")


def test_a_web_page(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "a")
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert refused(folder).endswith("it is a web page, as of a download that failed: fetch it again")


def test_a_width_of_heads_that_is_missing(tmp_path: Path) -> None:
    assert make_hf_folder(tmp_path / "a", head_dim=8)
    assert read_folder(tmp_path / "a").args.head_dim == 8
    assert refused(make_hf_folder(tmp_path / "b", head_dim=...)).endswith(
        "the matrices fit heads of 8: is head_dim 8 missing?"
    )
    assert "is head_dim" not in refused(make_hf_folder(tmp_path / "c", intermediate_size=48))


def classifier(state: dict[str, Tensor]) -> None:
    del state["lm_head.weight"]
    state["score.weight"] = torch.zeros(2, 24)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (classifier, "hold unknown score.weight: they are a classifier's: there is no output over words"),
        (lambda s: s.update({"v_head.summary.weight": torch.zeros(1, 24)}), "the value head of reinforcement learning"),
        (lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": BIAS}), "this model has no biases: use transf"),
    ],
    ids=["classifier", "value head", "biases"],
)
def test_other_kinds_of_models(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str) -> None:
    assert said in refused(make_hf_folder(tmp_path / "a", change=change))


def test_plain_weights_whose_config_still_has_them_quantized(tmp_path: Path) -> None:
    """What merge_and_unload leaves of a QLoRA, where the base was loaded in few bits."""
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    said = refused(make_hf_folder(tmp_path / "a", quantization_config=told))
    assert "if the weights were merged or dequantized, remove what config.json, or a file beside it, says about" in said
    assert "another model" not in said


def wrapped_twice(state: dict[str, Tensor]) -> None:
    """Each weight within one wrapper, and another weight within two."""
    plain = dict(state)
    state.clear()
    state |= {f"module.{name}": weight for name, weight in plain.items()}
    state |= {f"module._orig_mod.{name}": weight + 1 for name, weight in plain.items()}


def test_weights_of_two_wrappers_are_refused(tmp_path: Path) -> None:
    """The last was read, without a word."""
    said = refused(make_hf_folder(tmp_path / "a", change=wrapped_twice))
    assert "one weight in two forms, module." in said
    assert said.endswith(
        "and do not say which is meant: they are of two models, or of a conversion that did not end; "
        "fetch or write them again"
    )
