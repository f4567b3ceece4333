"""Adapters that add words: tables, tokenizer, template and ends, against PEFT and transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mistral import load
from mistral.chat.messages import Message
from mistral.chat.templates import find_template
from mistral.formats.convert import convert
from tests.support.chatml import KINDS, MESSAGES, ROWS, WORDS, chatml, hf_base, ids_of

pytest.importorskip("peft")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_pefts(tmp_path: Path, kind: str, tied: bool) -> None:
    if tied and kind == "rows of both":
        pytest.skip("PEFT itself has two answers; see test_what_has_no_rows_is_refused")
    base = hf_base(tmp_path / "base", tied)
    adapter, want = chatml(base, tmp_path / "adapter", **KINDS[kind])
    loaded = load(base, device="cpu", adapter=str(adapter))
    with torch.inference_mode():
        got = loaded.model.forward(ids_of(), [11])
    assert got.shape == want.shape == (11, ROWS + 2)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert loaded.args.vocab_size == ROWS + 2
    assert loaded.tokenizer.eos_ids == {2, ROWS + 1}
    assert loaded.args.tied_embeddings == (tied and kind != "modules_to_save")


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_a_merged_folder_is_transformers_own(tmp_path: Path, to: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = hf_base(tmp_path / "base")
    adapter, want = chatml(base, tmp_path / "adapter", multiple=64, **KINDS["modules_to_save"])
    written = convert(base, tmp_path / "merged", to, adapter=adapter)
    loaded = load(tmp_path / "merged", device="cpu")
    theirs = AutoTokenizer.from_pretrained(adapter)
    assert want.shape[1] == loaded.args.vocab_size == ROWS + 64
    assert loaded.tokenizer.eos_ids == {2, ROWS + 1}
    template = find_template(loaded.tokenizer, folder=loaded.words)
    ids = template.encode_chat([Message(one["role"], one["content"]) for one in MESSAGES])
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids.count(ROWS) == 3
    with torch.inference_mode():
        assert (loaded.model.forward(ids_of(), [11]) - want).abs().max() < 1e-5 * want.abs().max()
    assert ids == expected
    if to == "hf":
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert merged.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False) == expected
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        with torch.inference_mode():
            assert (model(ids_of()[None]).logits[0] - want).abs().max() < 1e-5 * want.abs().max()
        assert model.generation_config.eos_token_id == [2, ROWS + 1]
    assert any(f"2 tokens ({', '.join(WORDS)}) that base does not have" in note for note in written.notes)
