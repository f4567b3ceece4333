"""Adapters of text models inside others, and what is known of the base that one was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.formats import merge
from mistral.formats.adapter import AdapterError, read_adapter
from mistral.formats.folder import Folder, read_folder
from mistral.formats.merge import merge_into, release_named
from tests.support.adapters import peft_tensors, write_peft
from tests.support.folders import make_folder

BEFORE = "base_model.model."
FORMS = {
    "transformers 5": ("model.layers.", "model.language_model.layers."),
    "transformers 4": ("model.layers.", "language_model.model.layers."),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_text_model_inside_another(tmp_path: Path, form: str) -> None:
    """Names as PEFT writes them of a model that reads images, patterns of ranks included; its image part is left."""
    was, now = FORMS[form]
    tensors = peft_tensors()
    inside = {name.replace(BEFORE + was, BEFORE + now): tensor for name, tensor in tensors.items()}
    assert inside.keys() != tensors.keys()
    seeing = f"{BEFORE}model.vision_tower.transformer.layers.0.attention.q_proj"
    inside |= {f"{seeing}.lora_A.weight": torch.ones(3, 8), f"{seeing}.lora_B.weight": torch.ones(8, 3)}
    plain = write_peft(tmp_path / "plain", tensors, alpha_pattern={"layers.0.self_attn.q_proj": 3})
    wrapped = write_peft(tmp_path / "wrapped", inside, alpha_pattern={"layers.0.self_attn.q_proj": 3})
    one, two = read_adapter(plain), read_adapter(wrapped)
    assert one.pairs.keys() == two.pairs.keys()
    assert {n: p.scale for n, p in one.pairs.items()} == {n: p.scale for n, p in two.pairs.items()}
    assert any("1 matrices that read images" in note and "left aside" in note for note in two.notes)
    folder = read_folder(make_folder(tmp_path / "base"))
    for name in one.pairs:
        merged = [merge_into(folder, adapter).weights.get(name) for adapter in (one, two)]
        assert torch.equal(*merged)
        assert not torch.equal(merged[0], folder.weights.get(name))


def test_one_matrix_under_two_names_and_none_at_all(tmp_path: Path) -> None:
    tensors = peft_tensors()
    twice = tensors | {
        n.replace(f"{BEFORE}model.", f"{BEFORE}model.language_model."): t.clone() for n, t in tensors.items()
    }
    with pytest.raises(AdapterError, match="twice, under two names"):
        read_adapter(write_peft(tmp_path / "twice", twice))
    seeing = f"{BEFORE}vision_tower.layers.0.q_proj"
    alone = {f"{seeing}.lora_A.weight": torch.ones(3, 8), f"{seeing}.lora_B.weight": torch.ones(8, 3)}
    with pytest.raises(AdapterError, match="changes nothing of the text model"):
        read_adapter(write_peft(tmp_path / "alone", alone))


def notes_of(folder: Folder, adapter: Path) -> str:
    return "; ".join(merge_into(folder, read_adapter(adapter)).notes)


def test_what_speaks_against_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = read_folder(make_folder(tmp_path / "base"))
    monkeypatch.setattr(merge, "identify", lambda args: (release_named("mistralai/Mistral-7B-v0.1"), []))
    same = notes_of(folder, write_peft(tmp_path / "same"))
    assert "trained on mistralai/Mistral-7B-v0.1" in same
    assert "the weights are others" not in same
    other = write_peft(tmp_path / "other", base_model_name_or_path="mistralai/Mistral-7B-Instruct-v0.2")
    assert "which is 7B v0.2, and this model is 7B v0.1: it fits by its sizes" in notes_of(folder, other)
    unnamed = write_peft(tmp_path / "unnamed", base_model_name_or_path=None)
    assert "does not name its base: its sizes fit this model, and nothing else is known" in notes_of(folder, unnamed)
    half = {name: tensor for name, tensor in peft_tensors().items() if ".layers.0." in name}
    assert "changes 1 of 2 layers: its base may have had no more" in notes_of(folder, write_peft(tmp_path / "h", half))
    for i, chosen in enumerate(({"layers_to_transform": [0]}, {"target_modules": r"model\.layers\.0\..*_proj"})):
        assert "may have had no more" not in notes_of(folder, write_peft(tmp_path / f"chosen{i}", half, **chosen))
    last = {name: tensor for name, tensor in peft_tensors().items() if ".layers.1." in name}
    assert "may have had no more" not in notes_of(folder, write_peft(tmp_path / "last", last))


@pytest.mark.parametrize(
    ("base", "release"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "7B v0.3"),
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "7B v0.3"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral 8x7B v0.1"),
        ("mistralai/Mistral-Small-3.1-24B-Base-2503", "Small 3.1 24B"),
        ("mistralai/Ministral-3-8B-Instruct-2512", "Ministral 3 8B"),
        ("HuggingFaceH4/zephyr-7b-beta", None),
        ("someone/other-7b-v0.1", None),
        ("/home/me/checkpoint", None),
        ("", None),
    ],
)
def test_names_of_bases(base: str, release: str | None) -> None:
    found: Any = release_named(base)
    assert (found.name if found else None) == release
