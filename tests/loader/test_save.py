"""Models saved from memory, and folders without a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mistral
from mistral import complete, load
from mistral.model import Transformer
from mistral.tokenizer import TokenizerError
from mistral.util.errors import ConvertError, UsageError
from tests.support.folders import make_folder, random_state
from tests.support.tiny import tiny_args, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_loads_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    first = load(make_folder(tmp_path / "a", random_state(dtype=dtype)), device="cpu")
    with torch.no_grad():
        first.model.layers[1].attention.wk.weight[0, 0] = 0.25
    first.save(tmp_path / "b")
    second = load(tmp_path / "b", device="cpu")
    assert second.args == first.args
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (tmp_path / "a" / "tokenizer.model").read_bytes()
    for (name, x), (same, y) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(x.cpu(), y)
        assert x.dtype == y.dtype


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_ones_own(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tiny_args(tied_embeddings=tied), seed=3)
    model.save(tmp_path / "b")
    again = Transformer.from_folder(tmp_path / "b", device="cpu", attention="eager")
    assert again.args == model.args
    for (name, x), (same, y) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == same
        assert torch.equal(x, y)
    with pytest.raises(ConvertError, match="not empty"):
        mistral.save(model, tmp_path / "b")


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_weights_are_refused(quant: str, tmp_path: Path) -> None:
    loaded = load(make_folder(tmp_path / "a", tied_embeddings=True), device="cpu", quant=quant)
    with pytest.raises(UsageError, match="quantized"):
        loaded.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_folder_without_a_tokenizer_is_a_model_for_ids(tmp_path: Path) -> None:
    loaded = load(make_folder(tmp_path / "a", tokenizer=False), device="cpu")
    assert loaded.tokenizer is None
    assert "tokenizer none" in loaded.describe()
    assert any("no tokenizer" in note for note in loaded.notes)
    logits = loaded.model.forward(torch.tensor([1, 5, 9]), [3])
    assert logits.shape == (3, loaded.args.vocab_size)
    for prompt in ("Hello", [1, 5]):
        with pytest.raises(TokenizerError, match=r"add tokenizer\.model"):
            complete([prompt], loaded.model, loaded.tokenizer, max_tokens=1)
