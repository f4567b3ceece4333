"""There and back: what a folder says is kept, and what it does not say is not invented."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral.chat.messages import Message
from mistral.chat.templates import assumed, find_template
from mistral.formats.convert import convert
from mistral.formats.instruct import why_instruct
from mistral.formats.release_table import RELEASES
from mistral.formats.tokenizers import chat_templates, eos_ids, load_tokenizer
from mistral.loader.load import load
from tests.support.folders import BUNDLED, make_folder, random_state
from tests.support.gguf_files import gguf_args, tokenizer_keys, write_gguf

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADDED = {"<|im_start|>": 4096, "<|im_end|>": 4097}
CHAT = [Message("user", "Who is the king?")]


def says(folder: Path, vocab_size: int = 4098) -> dict[str, Any]:
    """What a folder says about texts."""
    tokenizer = load_tokenizer(folder, vocab_size)
    templates = chat_templates(folder)
    return {
        "ends": eos_ids(folder, tokenizer, vocab_size)[0],
        "templates": {name: one.text for name, one in templates.items()},
        "added": dict(tokenizer.added),
        "words": tokenizer.encode("The king <|im_end|> and\nthe  wolf"),
        "chat": find_template(tokenizer, folder=folder).encode_chat(CHAT),
    }


def hf_folder(folder: Path, tuned: bool) -> Path:
    """A folder in Hugging Face's layout: as published, or a fine-tune with tokens, a template and ends of its own."""
    source = make_folder(folder.with_name("made"), random_state(vocab_size=4098, dtype=torch.bfloat16), vocab_size=4098)
    convert(source, folder, "hf")
    if tuned:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {str(i): {"content": t, "special": True} for t, i in ADDED.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
        (folder / "tokenizer.json").unlink()  # a fine-tune of the slow tokenizer
        shape = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape | {"eos_token_id": [2, 4097]}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4097, "temperature": 0.3}))
    return folder


@pytest.mark.parametrize("tuned", [False, True], ids=["base", "tuned"])
def test_hf_to_mistral_to_hf(tmp_path: Path, tuned: bool) -> None:
    first = hf_folder(tmp_path / "a", tuned)
    want = says(first)
    assert bool(want["templates"]) == bool(want["added"]) == tuned
    assert want["ends"] == ({2, 4097} if tuned else {2})
    for to in ("mistral", "hf", "hf", "mistral", "mistral"):
        following = first.with_name(first.name + to[0])
        convert(first, following, to)
        assert says(following) == want
        first = following


@pytest.mark.parametrize(("name", "instruct"), [("Tiny-7B", False), ("Tiny-7B-Instruct", True), ("tiny-chat", True)])
def test_mistral_to_hf_to_mistral(tmp_path: Path, name: str, instruct: bool) -> None:
    """A base model gets no template; an instruct model one that writes the ids that its tokenizer's version wrote."""
    source = make_folder(tmp_path / name)
    chat = says(source, 4096)["chat"]
    notes = convert(source, tmp_path / "b", "hf").notes
    assert (tmp_path / "b" / "chat_template.jinja").is_file() == instruct
    (note,) = (note for note in notes if "chat_template.jinja" in note)
    assert note.startswith("chat_template.jinja was made" if instruct else "no chat_template.jinja was written")
    assert (f"is assumed from the name {name}" in note) == instruct
    convert(tmp_path / "b", tmp_path / "c", "mistral")
    for folder in (tmp_path / "b", tmp_path / "c"):
        told = says(folder, 4096)
        assert told["chat"] == chat
        assert bool(told["templates"]) == instruct
    convert(source, tmp_path / "d", "hf", instruct=True)
    assert "default" in chat_templates(tmp_path / "d")


@pytest.mark.parametrize("given", [None, 777])
def test_the_trained_length_is_not_invented(tmp_path: Path, given: int | None) -> None:
    """A config.json must have one; where nothing says it, whoever reads that file here knows that it was assumed."""
    source = make_folder(tmp_path / "a", random_state(), **({} if given is None else {"max_seq_len": given}))
    for before, after, to in (("a", "b", "hf"), ("b", "c", "hf"), ("c", "d", "mistral")):
        noted = any("training length" in note for note in convert(tmp_path / before, tmp_path / after, to).notes)
        assert noted == (given is None and to == "hf")
        assert load(tmp_path / after, device="cpu").trained_length == given
    config, params = (json.loads((tmp_path / name).read_text()) for name in ("c/config.json", "d/params.json"))
    assert config["max_position_embeddings"] == (given or 32768)
    assert config.get("assumed_values") == ({"max_position_embeddings": 32768} if given is None else None)
    assert params == json.loads((source / "params.json").read_text()) | {"rope_theta": params["rope_theta"]}


def test_a_name_that_is_lost_is_a_note(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "Tiny-Instruct")
    said = "is known from the name Tiny-Instruct alone, and q4 does not say so"
    assert any(said in note for note in convert(source, tmp_path / "q4", "mistral", quant="int4").notes)
    assert not any("alone" in note for note in convert(source, tmp_path / "Tiny-Instruct-2", "mistral").notes)


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_from_gguf(tmp_path: Path, to: str, template: str | None) -> None:
    extra = tokenizer_keys(BUNDLED / "tokenizer.model") | ({"tokenizer.chat_template": template} if template else {})
    file = tmp_path / "m.gguf"
    write_gguf(file, args=gguf_args(vocab_size=4096), extra=extra)
    convert(file, tmp_path / "out", to)
    found = {name: one.text for name, one in chat_templates(tmp_path / "out").items()}
    assert found == ({"default": template} if template else {})


def test_a_config_beside_params_names_ends_too(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "a")
    (source / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    shutil.copytree(source, tmp_path / "keep")
    for to in ("mistral", "hf"):
        convert(source, tmp_path / to, to)
        assert eos_ids(tmp_path / to, load_tokenizer(tmp_path / to, 4096), 4096)[0] == {2, 7}


def test_saving_keeps_the_ends_of_a_config(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "a", tuned=True)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    load(folder, device="cpu").save(tmp_path / "b")
    assert eos_ids(tmp_path / "b", load_tokenizer(tmp_path / "b", 4098), 4098)[0] == {2, 4097}
    assert says(tmp_path / "b") == says(folder)
    assert load(tmp_path / "b", device="cpu").trained_length == load(folder, device="cpu").trained_length == 512


def test_an_eos_token_of_the_config_beside_a_tokenizer_ends_too(tmp_path: Path) -> None:
    """As vLLM has it: the tokenizer.model has </s>, and tokenizer_config.json names a token that was added."""
    folder = hf_folder(tmp_path / "a", tuned=True)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    assert says(folder)["ends"] == {2}
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"eos_token": "<|im_end|>"}))
    assert says(folder)["ends"] == {2, 4097}
    convert(folder, tmp_path / "b", "mistral")
    assert says(tmp_path / "b") == says(folder)
    assert not (tmp_path / "b" / "generation_config.json").exists()


def test_whether_a_model_is_for_conversations(tmp_path: Path) -> None:
    by_name = {release.name: why_instruct(tmp_path / "model", release) for release in RELEASES}
    assert by_name["7B v0.2"] == "the release, 7B Instruct v0.2"
    assert by_name["7B v0.1"] is by_name["7B v0.3"] is by_name["Nemo 12B 2407"] is None
    cached = tmp_path / "models--mistralai--Mistral-7B-Instruct-v0.3" / "snapshots" / "0123"
    assert why_instruct(cached, None) == "the name models--mistralai--Mistral-7B-Instruct-v0.3"
    for name, told in (("Some-Instruct", True), ("m", False)):
        file = tmp_path / "m.gguf"
        write_gguf(file, args=gguf_args(vocab_size=4096), extra={"general.name": name})
        assert (why_instruct(file, None) is not None) == told


def test_the_note_on_a_template_that_nothing_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BUNDLED, 4096)
    told = assumed(find_template(tokenizer), tokenizer)
    assert told is not None
    assert told.startswith("no chat template is in the folder: v1 is assumed, as tokenizer.model has no control token")
    assert assumed(find_template(tokenizer, name="v1"), tokenizer) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert assumed(find_template(tokenizer, folder=tmp_path), tokenizer) is None
    told = assumed(find_template(tokenizer, release="mistrallite"), tokenizer)
    assert told == "no chat template is in the folder: mistrallite is assumed, that of the release"
