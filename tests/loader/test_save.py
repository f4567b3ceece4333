"""Models saved from memory, and folders without a tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral
from mistral import complete, load
from mistral.formats.convert import convert
from mistral.generate import generate
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
    with pytest.raises(TokenizerError, match=r"add tokenizer\.model"):
        complete(["Hello"], loaded.model, loaded.tokenizer, max_tokens=1)
    with pytest.raises(TokenizerError, match="stop strings are text"):
        complete([[1, 5]], loaded.model, loaded.tokenizer, max_tokens=1, stop=("x",))
    with pytest.raises(TokenizerError, match=r"add tokenizer\.model"):
        generate([[1, 5]], loaded.model, loaded.tokenizer, max_tokens=1)
    greedy = partial(complete, max_tokens=4, temperature=0)
    (made,) = greedy([[1, 5]], loaded.model, loaded.tokenizer)
    (known,) = greedy([[1, 5]], loaded.model, load().tokenizer, eos_ids=())
    assert (made.text, made.tokens, made.logprobs) == ("", known.tokens, known.logprobs)
    (ended,) = greedy([[1, 5]], loaded.model, loaded.tokenizer, eos_ids={made.tokens[0]})
    assert (ended.tokens, ended.finish_reason) == ([], "stop")
    scores = generate([[1, 5, 9]], loaded.model, loaded.tokenizer, max_tokens=0)
    assert scores == generate([[1, 5, 9]], loaded.model, load().tokenizer, max_tokens=0)


@pytest.mark.parametrize("wrong", ["tokenizer.model", object()])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, wrong: Any) -> None:
    folder = make_folder(tmp_path / "a")
    with pytest.raises(TokenizerError, match="is no tokenizer that can be used: it lacks"):
        load(folder, device="cpu", tokenizer=wrong)
    loaded = load(folder, device="cpu")
    for call in (complete, partial(generate, max_tokens=1)):
        with pytest.raises(TokenizerError, match=f"{type(wrong).__name__} is no tokenizer"):
            call(["Hello"], loaded.model, wrong)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_what_is_written_anew_is_not_called_left_behind(tmp_path: Path, layout: str) -> None:
    folder = make_folder(tmp_path / "a", form="parts")
    if layout == "hf":
        convert(folder, tmp_path / "hf", "hf")
        folder = tmp_path / "hf"
    (folder / "notes.txt").write_text("mine")
    saved = load(folder, device="cpu").save(tmp_path / "b")
    assert [note for note in saved.notes if "carried" in note] == ["not carried along: notes.txt"]
