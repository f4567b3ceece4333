"""Weights that torch.save wrote, in Hugging Face's layout: `pytorch_model.bin`, as fine-tunes of 2023 have them."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral.formats.folder import read_folder
from mistral.formats.inspect import inspect_folder
from mistral.formats.weights import WeightsError
from mistral.loader.load import load
from tests.formats.test_huggingface import make_hf_folder
from tests.support.commands import Command, in_process

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


def make_bin_folder(folder: Path, parts: int = 1, index: bool = True, **more: Tensor) -> dict[str, Tensor]:
    """A folder in Hugging Face's layout with weights of torch.save; returns its tensors, under their names."""
    make_hf_folder(folder)
    safe = folder / "model.safetensors"
    state = {**load_file(safe), **more}
    safe.unlink()
    names = list(state)
    where = {}
    for i in range(parts):
        name = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{i + 1:05}-of-{parts:05}.bin"
        mine = OrderedDict((n, state[n]) for n in names[i::parts])
        mine._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as state_dict() has it
        torch.save(mine, folder / name)
        where |= dict.fromkeys(mine, name)
    if parts > 1 and index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return state


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_folder(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("parts", "index"), [(1, True), (3, True), (3, False)])
def test_the_same_model_as_from_safetensors(tmp_path: Path, parts: int, index: bool) -> None:
    make_hf_folder(tmp_path / "safe")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # a buffer of transformers before 4.31
    make_bin_folder(tmp_path / "bin", parts, index, **old)
    want = load(tmp_path / "safe", device="cpu").model.state_dict()
    got = load(tmp_path / "bin", device="cpu").model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_bin_folder(tmp_path, 2)
    ids = torch.randint(0, 90, (1, 40), generator=torch.Generator().manual_seed(3))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load(tmp_path, device="cpu", dtype="float32").model
    with torch.no_grad():
        want, got = theirs(ids).logits[0], model(ids[0], [40])
    assert (want - got).abs().max() < 1e-4


def test_safetensors_are_preferred_and_the_others_named(tmp_path: Path) -> None:
    make_bin_folder(tmp_path)
    make_hf_folder(tmp_path, seed=1)
    found = read_folder(tmp_path)
    assert [file.name for file in found.weights.files] == ["model.safetensors"]
    assert any("not read" in said and "pytorch_model.bin" in said for said in inspect_folder(tmp_path)["suspicious"])


def test_what_inspect_says_of_it(tmp_path: Path) -> None:
    make_bin_folder(tmp_path, 2)
    report = inspect_folder(tmp_path)
    roles = {file["name"]: file["role"] for file in report["files"]}
    assert roles[INDEX] == "index"
    assert [name for name, role in roles.items() if role == "weights"] == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]
    assert report["serve"]["convert_first"] is None
    assert "--load_format auto" in report["serve"]["commands"][-1]


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_converted(cli: Command, tmp_path: Path, to: str) -> None:
    state = make_bin_folder(tmp_path / "bin", 2)
    done = cli("convert", tmp_path / "bin", tmp_path / "safe", "--to", to)
    assert "not carried along" not in done.err
    assert not list((tmp_path / "safe").glob("*.bin*"))
    again = load(tmp_path / "safe", device="cpu").model.state_dict()
    assert torch.equal(again["output.weight"], state["lm_head.weight"])
    want = load(tmp_path / "bin", device="cpu").model.state_dict()
    assert all(torch.equal(again[name], want[name]) for name in want)


def test_a_part_is_missing(tmp_path: Path) -> None:
    make_bin_folder(tmp_path, 2, index=False)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    assert "has 1 of 2 parts of its weights: part 2 is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model-00009-of-00009.bin", "which is missing"),
        ("model.safetensors", "which is no bin file beside it"),
        ("../pytorch_model.bin", "which is no bin file beside it"),
    ],
)
def test_an_index_that_names_other_files(tmp_path: Path, file: str, said: str) -> None:
    make_bin_folder(tmp_path, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert said in refusal(tmp_path)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    state = make_bin_folder(tmp_path, 2, index=False)
    torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin")
    assert "tensors that are split over several .bin files, which is not supported" in refusal(tmp_path)


class Spy:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


def test_nothing_in_it_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = make_bin_folder(tmp_path / "bin")
    torch.save({**state, "spy": Spy()}, tmp_path / "bin" / "pytorch_model.bin")
    assert "which is code and was not run" in refusal(tmp_path / "bin")
    assert not (tmp_path / "made by a pickle").exists()


def test_what_a_trainer_leaves_is_no_weights(tmp_path: Path) -> None:
    make_bin_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "training_args.bin")
    assert refusal(tmp_path).startswith(f"no weights in {tmp_path}: expected model.safetensors, or ")
    make_bin_folder(tmp_path / "checkpoint-10")
    assert refusal(tmp_path).endswith("; there are some in checkpoint-10 there: give that folder")


def test_the_pickle_of_an_old_torch(tmp_path: Path) -> None:
    state = make_bin_folder(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "has torch.save's form from before PyTorch 1.6: load it there and save it again" in refusal(tmp_path)
