"""Perplexity: equal to the plain computation, at any length and chunk, and as a command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.cache import RollingBufferCache
from mistral.eval.perplexity import Score, perplexity
from mistral.util.errors import UsageError
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder
from tests.support.tiny import ragged, tiny_args, tiny_model, true_logprobs


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    return in_process(capfd)


@given(
    length=st.integers(2, 90),
    chunk=st.integers(1, 100),
    window=st.sampled_from([None, 1, 5, 17, (None, 4)]),
    seed=st.integers(0, 99),
)
def test_it_is_the_plain_computation(length: int, chunk: int, window: Any, seed: int) -> None:
    model = tiny_model(tiny_args(sliding_window=window), seed=seed)
    (prompt,) = ragged([length], model.args.vocab_size, seed=seed)
    ids, truth = prompt.tolist(), true_logprobs(model, [prompt])[0]
    nats = -sum(float(row[wanted]) for row, wanted in zip(truth, ids[1:], strict=False))
    told: list[tuple[int, int]] = []
    score = perplexity(model, ids, chunk_size=chunk, progress=lambda *at: told.append(at))
    assert score.tokens == length - 1
    assert score.nats == pytest.approx(nats, abs=1e-5 * length)
    assert score.perplexity == pytest.approx(math.exp(nats / (length - 1)), rel=1e-4)
    assert told[-1] == (length - 1, length - 1)
    assert len(told) == -(-(length - 1) // chunk)


def test_memory_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Spy(RollingBufferCache):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self.nbytes)

    monkeypatch.setattr("mistral.model.RollingBufferCache", Spy)
    monkeypatch.setattr("mistral.eval.perplexity.LOGIT_FLOATS", 1)  # a row of logits at a time
    model = tiny_model(tiny_args(sliding_window=4))
    whole = [perplexity(model, ids.tolist(), chunk_size=16) for ids in ragged([50, 500], model.args.vocab_size)]
    assert made[0] == made[1]
    assert [score.tokens for score in whole] == [49, 499]


@pytest.mark.parametrize(
    ("ids", "chunk", "error"),
    [
        ([], 1, "0 tokens"),
        ([1], 1, "1 token"),
        ([1, 2], 0, "chunk_size is 0"),
        ([1, 10**6], 1, "the id 1000000, outside"),
        ([1, -1], 1, "the id -1, outside"),
    ],
)
def test_what_cannot_be_scored(ids: list[int], chunk: int, error: str) -> None:
    with pytest.raises(UsageError, match=error):
        perplexity(tiny_model(tiny_args()), ids, chunk_size=chunk)


def test_numbers_that_are_none() -> None:
    model = tiny_model(tiny_args())
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(UsageError, match="NaN: the weights are broken: 24 of the 24 numbers of norm.weight are NaN"):
        perplexity(model, [1, 2, 3])
    assert Score(1, 1e9).perplexity == math.inf


def test_the_command(cli: Command, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a king.\n" * 20, encoding="utf-8")
    facts = json.loads(cli("perplexity", folder, text, "--json").text)
    assert facts.keys() == {"tokens", "nats", "perplexity", "characters"}
    assert facts["characters"] == 35 * 20
    assert facts["perplexity"] == pytest.approx(math.exp(facts["nats"] / facts["tokens"]))
    done = cli("perplexity", folder, text, "--chunk_size", 7)
    assert float(done.text.split()[1].rstrip(":")) == pytest.approx(facts["perplexity"], rel=1e-4)
    piped = cli("perplexity", folder, "--json", stdin=text.read_text(encoding="utf-8"))
    assert json.loads(piped.text) == facts
    assert "perplexity" in cli("perplexity", text).text  # the bundled model


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.write_bytes(b""), "/text is empty"),
        (lambda path: path.write_bytes(b"voil\xe0"), "is not UTF-8"),
    ],
)
def test_texts_that_are_refused(cli: Command, tmp_path: Path, make: Any, error: str) -> None:
    path = tmp_path / "text"
    make(path)
    done = cli("perplexity", make_folder(tmp_path / "model"), path)
    assert done.code == 2
    assert error in done.error


def test_one_token_is_one(cli: Command, tmp_path: Path) -> None:
    assert " over 1 token, " in cli("perplexity", make_folder(tmp_path / "model"), "-", stdin=b"a").text
