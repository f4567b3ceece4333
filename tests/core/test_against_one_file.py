"""The library against one_file_ref.py, two readings of the contract that share no line: same numbers, same texts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import main
import one_file_ref
from mistral.args import QueryScaling, Yarn
from mistral.formats.folder import BUNDLED
from mistral.generate import generate
from mistral.model import Transformer
from test_generate import DebugTokenizer
from tests.support.tiny import ragged, tiny_args, tiny_model, whole

FAMILY = st.sampled_from(
    [
        {},
        {"tied_embeddings": True},
        {"yarn": Yarn(16, 8, 8, 1), "head_dim": 16},
        {"yarn": Yarn(4, 8, attention_factor=1.0), "llama_4_scaling": QueryScaling(8, 0.4), "tied_embeddings": True},
        {"llama_4_scaling": QueryScaling(5, 0.7)},
    ]
)
WINDOWS = st.sampled_from([1, 3, 7, 100, None, (None, 3), (2, 5)])


def twin(model: Transformer) -> one_file_ref.Transformer:
    """one_file_ref's model with the same weights."""
    other = one_file_ref.Transformer(one_file_ref.ModelArgs(**model.args.to_params()))
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


@settings(max_examples=50)
@given(WINDOWS, FAMILY, st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 1000))
def test_logits_of_packed_sequences(window: object, member: dict[str, Any], lens: list[int], seed: int) -> None:
    model = tiny_model(tiny_args(sliding_window=window, **member), seed=seed)
    prompts = ragged(lens, model.args.vocab_size, seed)
    with torch.inference_mode():
        other = twin(model)(torch.cat(prompts), lens)
        ours = torch.cat(whole(model, prompts))
    assert (ours.log_softmax(-1) - other.log_softmax(-1)).abs().max() < 1e-5


@given(WINDOWS, FAMILY, st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 1000))
def test_greedy_generation_in_chunks(
    window: object, member: dict[str, Any], lens: list[int], chunk: int, seed: int
) -> None:
    model = tiny_model(tiny_args(sliding_window=window, **member), seed=seed)
    ids = [p.tolist() for p in ragged(lens, model.args.vocab_size, seed)]
    texts, logprobs = generate(ids, model, DebugTokenizer(), max_tokens=12, temperature=0, chunk_size=chunk)
    made, scores = one_file_ref.generate(ids, twin(model), 12, DebugTokenizer.eos_id, chunk_size=chunk + 1)
    assert [list(map(int, text.split())) for text in texts] == [p + m for p, m in zip(ids, made, strict=True)]
    for ours, theirs in zip(logprobs, scores, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_same_three_texts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["demo"]) == 0
    ours = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["one_file_ref"])
    one_file_ref.main()
    assert capsys.readouterr().out == ours
    assert all(prompt in ours for prompt in json.loads((BUNDLED / "prompts.json").read_text()))
    assert ours.count("\n" + "=" * 21 + "\n") == 3
