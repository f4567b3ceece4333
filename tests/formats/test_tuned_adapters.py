"""Adapters as people have them: with other tasks, broken numbers, in folders of trainers, with words of their own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mistral import Chat, complete, load
from mistral.chat.templates import TemplateError, find_template
from mistral.formats.adapter import AdapterError, read_adapter
from mistral.formats.adapter_forms import convert_adapter
from mistral.formats.hf_tokenizer import to_tokenizer_json
from mistral.formats.inspect_adapter import as_text, report
from mistral.tokenizer import Tokenizer
from mistral.util.errors import UsageError
from tests.support.adapters import peft_tensors, write_native, write_peft
from tests.support.chatml import TEMPLATE
from tests.support.folders import BUNDLED, make_folder


def test_an_adapter_with_nan_is_not_said_to_be_large(tmp_path: Path) -> None:
    tensors = peft_tensors()
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = math.nan
    adapter = write_peft(tmp_path / "adapter", tensors)
    with pytest.raises(AdapterError, match=r"^the adapter has NaN or infinity in .*layers\.1\.mlp\.down_proj\.lora"):
        load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))


def test_an_adapter_that_changes_nothing_is_named(tmp_path: Path) -> None:
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in peft_tensors().items()}
    base, said = make_folder(tmp_path / "base"), "every lora_B of the adapter is zero, as before training"
    adapter = str(write_peft(tmp_path / "adapter", tensors))
    for mode in ("merge", "runtime"):
        notes = load(base, device="cpu", adapter=adapter, adapter_mode=mode).notes
        assert any(note.startswith(said) for note in notes)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 1] = 1
    adapter = str(write_peft(tmp_path / "adapter", tensors))
    assert not any(note.startswith(said) for note in load(base, device="cpu", adapter=adapter).notes)


@pytest.mark.parametrize("task", ["SEQ_CLS", "FEATURE_EXTRACTION"])
def test_adapters_of_models_with_another_task_are_told(tmp_path: Path, task: str) -> None:
    inner = {name.replace("model.model.", "model."): tensor for name, tensor in peft_tensors().items()}
    adapter = write_peft(tmp_path / "adapter", inner, task_type=task)
    with pytest.raises(
        AdapterError, match=f"no matrix of this model; .* has task_type {task}: its model gives .*, not"
    ):
        read_adapter(adapter)
    write_peft(adapter, inner, task_type=["SEQ_CLS"])
    with pytest.raises(AdapterError, match="no matrix of this model$"):
        read_adapter(adapter)
    read_adapter(write_peft(adapter, task_type=task))  # what can be used is used


def test_names_of_a_model_in_memory_are_told(tmp_path: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in peft_tensors().items()}
    with pytest.raises(AdapterError, match=r"PEFT's model in memory .* save it with save_pretrained"):
        read_adapter(write_peft(tmp_path / "adapter", named))


def test_the_folder_of_a_run_of_mistral_finetune(tmp_path: Path) -> None:
    inside = tmp_path / "run" / "checkpoints" / "checkpoint_000010"
    inside.mkdir(parents=True)
    write_native(inside / "consolidated")
    with pytest.raises(AdapterError, match=r"there is an adapter in checkpoints/checkpoint_000010/consolidated: give"):
        read_adapter(tmp_path / "run")


def renamed(adapter: Path) -> Path:
    """An adapter as unsloth's map_eos_token leaves it: <|im_end|> in the place of </s>, and a chat template."""
    made = to_tokenizer_json(Tokenizer(BUNDLED / "tokenizer.model"))
    assert made is not None
    (adapter / "tokenizer.json").write_text(made.replace("</s>", "<|im_end|>"), encoding="utf-8")
    told = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    return adapter


def test_words_in_the_place_of_others_have_rows(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    adapter = renamed(write_peft(tmp_path / "adapter", base_model_name_or_path=str(base)))
    assert "(<|im_end|>), with the chat template chat_template.jinja; its base has rows for them" in as_text(
        report(adapter)
    )


def test_the_other_form_keeps_the_words(tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base")
    adapter = renamed(write_peft(tmp_path / "adapter"))
    convert_adapter(adapter, tmp_path / "native", "mistral", base)
    convert_adapter(tmp_path / "native", tmp_path / "again", "hf", base)
    for folder in (adapter, tmp_path / "native", tmp_path / "again"):
        loaded = load(base, device="cpu", adapter=str(folder))
        assert loaded.words == folder
        with pytest.raises(TemplateError, match=r"find_template\(tokenizer, folder=loaded\.templates\)"):
            Chat(loaded.model, loaded.tokenizer, None)
        assert find_template(loaded.tokenizer, folder=loaded.templates).name == "chat_template.jinja"
        assert loaded.tokenizer.has_control("<|im_end|>")
    (tmp_path / "native" / "tokenizer_config.json").unlink()
    (tmp_path / "native" / "tokenizer.json").rename(tmp_path / "native" / "tokenizer.model.v3")
    convert_adapter(tmp_path / "native", tmp_path / "plain", "hf", base)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_name_where_the_adapter_is_merged(tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "mine")
    loaded = load(make_folder(tmp_path / "base"), device="cpu", adapter=str(adapter))
    with pytest.raises(UsageError, match="no adapter is called 'mine': none is beside the weights .* --adapter_mode"):
        complete(["The"], loaded.model, loaded.tokenizer, adapter="mine", max_tokens=1)
